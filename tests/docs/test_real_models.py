"""The README's commands for real models, with directories in place of hub ids."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from serving import STOP_SECONDS, free_port, wait_until_answers

ROOT = Path(__file__).resolve().parents[2]
MODELS = os.environ.get("TRIMTAB_REAL_MODELS")
PLACES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-coder",
}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(MODELS is None, reason="TRIMTAB_REAL_MODELS names no directory with real models"),
]


def here(text: str) -> str:
    """The text with directories in place of hub ids."""
    for hub_id, name in PLACES.items():
        text = text.replace(hub_id, str(Path(MODELS, name).resolve()))
    return text


def test_a_control_is_trained_beside_one_model_and_served_on_others(tmp_path, monkeypatch):
    """As the README says it, with a few questions and steps only."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    train, serve = re.search(r"^(trimtab recipes copy.*)\n(trimtab serve.*)$", page, re.MULTILINE).groups()
    copy, enter, run = train.split(" && ")
    subprocess.run(shlex.split(copy), cwd=tmp_path, check=True)
    directory = tmp_path / enter.removeprefix("cd ")
    for path in directory.glob("*.jsonl"):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    recipe = directory / "recipe.yaml"
    recipe.write_text(here(recipe.read_text(encoding="utf-8")), encoding="utf-8")
    short = ["--max_steps", "2", "--template.cache_dir", str(tmp_path / "cache")]
    subprocess.run([*shlex.split(run), *short], cwd=directory, check=True)

    port, log = free_port(), tmp_path / "log"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    command = [*shlex.split(here(serve)), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=directory, stdout=file, stderr=file)
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/ready", process, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for name in PLACES.values():
            answer = client.chat.completions.with_raw_response.create(
                model=name,
                messages=[{"role": "user", "content": "Tell me the capital of France."}],
                max_tokens=4,
                extra_body={"control": "discreet"},
            )
            assert answer.headers["x-trimtab-control"] == "discreet=1"
            assert answer.parse().choices[0].message.content
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
