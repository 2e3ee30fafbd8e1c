"""The benchmarks run, print a table and end in a line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def last_line(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_mapping_tables_are_timed_against_the_reference_s_algorithm():
    pytest.importorskip("mistral_common", reason="mistral_common ships the real tokenizers")
    found = last_line("mappings.py", "--pair", "mistral-v1:estranged", "--rounds", 1, "--sample", 2)
    (result,) = found["results"]
    assert (result["target_tokens"], result["control_tokens"]) == (32_000, 32_000)
    assert result["missing"] == 32_000 - 3
    assert 0 < result["nearest_s"] < result["reference_s"]
    assert result["peak_mb"] > 0


def test_strategies_are_scored_on_trained_tokenizers(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cats sat on the mat, and the dogs did not\n" * 20, encoding="utf-8")
    pair = "byte-level-290:word-piece-60"
    found = last_line("scores.py", "--training", text, "--text", text, "--pair", pair)
    (result,) = found["results"]
    assert result["pair"] == pair
    assert 0 < result["exact"] <= result["first-segment"] <= 1
