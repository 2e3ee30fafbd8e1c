"""The gateway's benchmarks, on real gateways before workers that have vLLM's interface and no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miniature import miniature
from trimtab_training.world.world import make_world

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TELLING = Path(__file__).with_name("telling_vllm.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("worlds") / "1"
    make_world(directory, 1, settings=miniature())
    return directory


def run(name: str, world: Path, fault: str = "", **options) -> tuple[int, dict, str]:
    """The status of a benchmark whose worker has this fault, what it found, and what it complained of."""
    words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, str(BENCHMARKS / name), f"--world={world}", *words]
    done = subprocess.run(
        [*command, f"--stand-in={TELLING}"],
        env=os.environ | {"TELLING_FAULT": fault},
        cwd=BENCHMARKS.parent,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])["results"], done.stderr


def results_of(name: str, world: Path, **options) -> dict:
    status, results, complaints = run(name, world, **options)
    assert status == 0, complaints
    return results


def test_wrong_requests_are_refused_and_nothing_else_happens(world):
    found = results_of("fuzz.py", world, requests=500, examples=5)
    assert sum(found["statuses"].values()) == 500
    assert found["statuses"]["200"] > 0
    assert found["statuses"]["400"] > 200
    assert (found["restarts"], found["faults"]) == (0, 0)
    assert found["schemathesis"]["requests"] > 50
    assert found["schemathesis"]["failures"] == 0


@pytest.mark.parametrize(
    ("fault", "complaint"), [("broken", "500 b'{"), ("bare", "400 without an error object")]
)
def test_the_fuzz_fails_where_a_worker_answers_as_it_should_not(world, fault, complaint):
    status, found, complaints = run("fuzz.py", world, fault, requests=300, examples=0)
    assert status == 1
    assert found["faults"] > 0
    assert complaint in complaints


SHORT = {"streams": 8, "people": 2}


def test_streams_are_right_while_controls_come_and_go_and_a_worker_is_killed(world):
    found = results_of("soak.py", world, minutes=0.15, kill_every=3, **SHORT)
    assert min(found["right"].values()) > 0
    assert found["wrong"] == {"a": 0, "b": 0}
    assert found["failed"]["a"] == 0
    assert found["changes"] > 0
    assert found["kills"] > 0
    assert found["restarts"] > 0


def test_the_soak_fails_where_streams_are_mixed_up(world):
    status, found, complaints = run("soak.py", world, "mixed", minutes=0.05, kill_every=60, **SHORT)
    assert status == 1
    assert min(found["wrong"].values()) > 0
    assert "in place of" in complaints


def test_ways_to_a_worker_are_compared_round_by_round(world):
    found = results_of("gateway_overhead.py", world, rounds=1, requests=5, streams=2, tokens=4)
    assert found["direct"]["added_ms"]["median"] == 0
    assert found["direct"]["throughput_ratio"]["median"] == 1
    assert found["gateway"]["latency_ms"] > 0


def test_the_gateway_is_compared_with_its_own_workers_socket_too(world):
    found = results_of("gateway_overhead.py", world, rounds=1, requests=5, streams=2, tokens=4, way="socket")
    assert set(found) == {"direct", "gateway"}
    assert found["gateway"]["throughput_ratio"]["median"] > 0


def test_long_prompts_are_sent_beside_small_requests_and_both_are_counted(world):
    found = results_of("long_prompts.py", world, requests=9, at_once=3, alone=1, largest=2)
    statuses = found["statuses"]
    assert sum(statuses.values()) == 9
    assert all(statuses[f"{kind}: 413"] for kind in ("text", "messages", "lists"))
    assert all(statuses[f"{kind}: 200"] for kind in ("image", "short enough", "no control"))
    assert (found["failed"], found["restarts"]) == (0, 0)
    assert min(found["small_requests"].values()) > 0
