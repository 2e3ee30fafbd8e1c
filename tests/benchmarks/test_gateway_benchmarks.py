"""The gateway's benchmarks, on real gateways before workers that have vLLM's interface and no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fake_vllm
from miniature import miniature
from trimtab_training.world import make_world

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("worlds") / "1"
    make_world(directory, 1, settings=miniature())
    return directory


def results_of(name: str, world: Path, **options) -> dict:
    words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, str(BENCHMARKS / name), f"--world={world}", *words]
    done = subprocess.run(
        [*command, f"--stand-in={fake_vllm.__file__}"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["results"]


def test_wrong_requests_are_refused_and_nothing_else_happens(world):
    found = results_of("fuzz.py", world, requests=300)
    assert sum(found["statuses"].values()) == 300
    assert found["statuses"]["200"] > 0
    assert found["statuses"]["400"] > 100
    assert (found["restarts"], found["faults"]) == (0, 0)


def test_streams_are_right_while_controls_come_and_go_and_a_worker_is_killed(world):
    found = results_of("soak.py", world, minutes=0.15, streams=8, kill_every=3, people=2)
    assert min(found["right"].values()) > 0
    assert found["wrong"] == {"a": 0, "b": 0}
    assert found["failed"]["a"] == 0
    assert found["changes"] > 0
    assert found["kills"] > 0
    assert found["restarts"] > 0


def test_ways_to_a_worker_are_compared_round_by_round(world):
    found = results_of("gateway_overhead.py", world, rounds=1, requests=5, streams=2, tokens=4)
    assert found["direct"]["added_ms"]["median"] == 0
    assert found["direct"]["throughput_ratio"]["median"] == 1
    assert found["gateway"]["latency_ms"] > 0
