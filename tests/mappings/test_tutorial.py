"""The code of docs/mappings.md runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "mappings.md"
BLOCKS = re.findall(
    r"^```(python|sh)\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_tutorial_runs_from_top_to_bottom(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    languages = [language for language, _ in BLOCKS]
    shell = languages.index("sh")
    assert languages == ["python"] * shell + ["sh"] * (len(languages) - shell)
    for language, blocks in (("python", BLOCKS[:shell]), ("sh", BLOCKS[shell:])):
        program = "\n".join(code for _, code in blocks)
        command = [sys.executable, "-c", program] if language == "python" else ["sh", "-ec", program]
        done = subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if language == "python":
            assert done.stdout.startswith("Coverage(exact=")
    assert (tmp_path / "summary.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "summary.json").read_text(encoding="utf-8").startswith("{")
