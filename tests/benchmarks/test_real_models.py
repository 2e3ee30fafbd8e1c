"""The benchmark of real models, where everything was trained and asked before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "real_models.py"


def cell(strength: float, routing: str | None, mean: float) -> dict:
    return {"group": "names", "score": "contains", "strength": strength, "routing": routing, "mean": mean}


def keep(place: Path, *cells: dict) -> None:
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({"cells": cells}))


def test_the_table_has_medians_over_the_seeds_and_what_a_user_would_do_instead_beside_them(tmp_path):
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models" / "smollm2" / "config.json").write_text("{}")
    for seed, mean in ((1, 0.5), (2, 1.0), (3, 0.75)):
        directory = tmp_path / "kept" / f"name-{seed}"
        results = directory / "results"
        keep(results / "smollm2-control-0-1-path", cell(0, None, 0.25), cell(1, "path", mean))
        keep(results / "smollm2-control-1-pm-mined", cell(1, "pm-mined", 0))
        keep(results / "smollm2-system-prompt", cell(0, None, 0.125))
        keep(results / "smollm2-lora", cell(0, None, 0.875))
        (directory / "lora-smollm2").mkdir()
        (directory / "lora-smollm2" / "lora.json").write_text(json.dumps({"seconds": 34.0}))
        (directory / "pack").mkdir()
        (directory / "pack" / "trimtab.json").write_text(json.dumps({"training": {"seconds": 12.0}}))
    places = [f"--models={tmp_path / 'models'}", f"--kept={tmp_path / 'kept'}"]
    grid = ["--strength=0", "--strength=1"]
    command = [sys.executable, str(BENCHMARK), *places, "--task=name", "--target=smollm2", "--lora", *grid]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| target | questions | score | 0 | 1 path | 1 pm-mined | system prompt | LoRA |" in done.stdout
    values = "0.25 (0.25 to 0.25) | 0.75 (0.50 to 1.00) | 0.00 (0.00 to 0.00) | 0.12 | 0.88"
    assert f"| smollm2 | names | contains | {values} |" in done.stdout
    assert "name, smollm2: LoRA trained in 34 s" in done.stdout
    assert "name, seed 3: trained in 12 s" in done.stdout
