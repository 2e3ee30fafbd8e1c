"""Every block of code in the documents is run, loaded or parsed, as far as there is something to do it on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import typer
import yaml

from served import served
from serving import ENGINE, engine_environment, gateway
from trimtab_processors.pack import load_pack
from trimtab_server.cli import app
from trimtab_server.config.schema import load_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = [ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
ELSEWHERE = {
    "mappings.md": {"python", "sh", ""},
    "containers.md": {""},
    "README.md": {""},
    "idea.md": {""},
    "evaluation.md": {"yaml"},
    "similarity.md": {"yaml"},
    "training.md": {"yaml"},
}
"""Pictures, and what tests/mappings/test_tutorial.py, tests/deploy/test_compose.py,
tests/training/evaluation/test_eval_command.py, tests/training/similarity/test_similarity_command.py,
tests/training/control/test_page.py run.
"""
PLACES = re.compile(r"(?<![\w.:/])/(?:srv|opt|etc)/[\w./-]+")
"""Absolute paths, which are the reader's."""
ADMIN = "ADMINKEY"
FAIL = ("--no-fail", "--fail-with-body")
"""An answer that is an error ends curl with one, and is shown."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Of a block of shell, as a shell would split it."""
        joined = re.sub(r"\s+# .*", "", self.text.replace("\\\n", " "))
        quoted = re.findall(r"(?:'[^']*'|[^'\n])+", joined)  # a quoted line break ends no command
        return [words for line in quoted if (words := shlex.split(line))]


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            block = Block(page, line, match[1], match[2])
            if match[1] not in ELSEWHERE.get(page.name, ()):
                found.append(block)
    return found


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in blocks() if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


def test_every_block_is_of_a_kind_that_is_run_here():
    kinds = {block.language for block in blocks()}
    assert kinds == {"sh", "python", "yaml", "json", "ini"}


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    for page in [*PAGES, *WITHOUT_CODE]:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            file = page.parent / target if target else page
            assert file.exists(), (page.name, target)
            assert not anchor or anchor in anchors(file), (page.name, target, anchor)


def test_the_index_leads_to_every_document():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_the_index_of_the_decisions_leads_to_each():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in folder.glob("[0-9]*.md") if f"({page.name})" not in index] == []


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@of("yaml")
def test_a_configuration_is_one(block, tmp_path, family):
    """Or Prometheus', whose own tests are those of the dashboards."""
    given = yaml.safe_load(block.text)
    if "scrape_configs" in given:
        deployed = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
        assert given["rule_files"] == deployed["rule_files"]
        assert given["scrape_configs"] == deployed["scrape_configs"]
        return
    file = tmp_path / "config.yaml"
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "manners").symlink_to(family.control)
    file.write_text(within(tmp_path, block.text), encoding="utf-8")
    for name in ("keys.txt", "admin-keys.txt"):
        (tmp_path / name).write_text("key\n")
    assert load_settings(file).models.keys() == given["models"].keys()


def within(directory: Path, text: str) -> str:
    """The text with the reader's absolute paths below `directory`."""
    return PLACES.sub(lambda match: str(placed(directory, match[0])), text)


def placed(directory: Path, path: str) -> Path:
    """The same path below `directory`, where there is now something."""
    place = directory / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix:
        place.touch()
    else:
        place.mkdir(exist_ok=True)
    return place


@of("json")
def test_a_manifest_is_one(block, tmp_path):
    (tmp_path / "trimtab.json").write_text(block.text, encoding="utf-8")
    assert load_pack(str(tmp_path)).name == json.loads(block.text)["name"]


@of("ini")
def test_a_service_starts_a_command_that_there_is(block, files):
    (command,) = re.findall(r"^ExecStart=(.+)$", block.text, re.MULTILINE)
    program, *arguments = shlex.split(command)
    parse(
        [Path(program).name, *(PLACES.sub(lambda match: str(placed(files, match[0])), a) for a in arguments)]
    )


@pytest.fixture(scope="module")
def api(tmp_path_factory, family):
    """A gateway on a real socket with the names that the documents use; its workers have vLLM's interface."""
    directory = tmp_path_factory.mktemp("documents")
    (directory / "admin-keys").write_text(ADMIN)
    packs = directory / "srv" / "packs"
    packs.mkdir(parents=True)
    (packs / "terse").mkdir()
    for file in family.control.iterdir():
        (packs / "terse" / file.name).write_bytes(file.read_bytes())
    config = {
        "controls": {"manners": str(family.control)},
        "admin_keys_file": "admin-keys",
        "control_roots": [str(packs)],
        "models": {"a": {}, "b": {}},
    }
    with served(directory, **config) as running:
        running.packs = packs
        yield running.wait_until_ready()


def here(text: str, api) -> str:
    """The gateway and the packs of this test in place of the documents'."""
    return text.replace("localhost:8000", f"127.0.0.1:{api.port}").replace("/srv/packs", str(api.packs))


@of("sh")
def test_every_command_does_or_is_what_the_document_says(block, request, files):
    for words in block.commands:
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        match words:
            case ["curl", *_]:
                api = request.getfixturevalue("api")
                done = subprocess.run(
                    [*(here(word, api) for word in words), *FAIL],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout + done.stderr
                json.loads(done.stdout)
            case ["make", target]:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            case ["pip", "install", wanted]:
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
                    "optional-dependencies"
                ]
                assert re.fullmatch(r"\.\[(\w+)\]", wanted)[1] in extras  # no index has the package
            case ["trimtab", *_]:
                parse(words)
            case ["python", "-m", "vllm.entrypoints.openai.api_server", *flags]:
                parse_for_vllm(flags)
            case ["python", "-m", "trimtab_training.evaluation.lm_eval_adapter", *_]:
                assert importlib.util.find_spec(
                    words[2]
                )  # tests/training/evaluation runs it where lm-eval is
            case ["sh", script] | [".venv-clients/bin/python", script] | ["python", script, *_]:
                assert (ROOT / script).is_file()
            case _:
                raise AssertionError(f"nobody runs this: {words}")


def parse(words: list[str]) -> None:
    """Find the command that is meant, and let it read its arguments."""
    assert words[0] == "trimtab"
    command, arguments = typer.main.get_command(app), words[1:]
    context = command.make_context("trimtab", [*arguments])
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        context = command.make_context(name, [*arguments], parent=context)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Where the reader is: what the documents name stands there."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "table.safetensors", "other.safetensors", "corpus.txt"):
        (tmp_path / name).touch()
    return tmp_path


READ_BY_VLLM = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
assert "trimtab" in make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:]).additional_config
"""


def parse_for_vllm(flags: list[str]) -> None:
    """In a process of its own: importing vLLM warns."""
    command = [sys.executable, "-c", READ_BY_VLLM, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@of("python")
def test_a_program_runs(block, tmp_path, request):
    """What one prints is what it was told."""
    text = block.text
    if "localhost:8000" in text:
        text = here(text, request.getfixturevalue("api"))
    command = [sys.executable, "-W", "error", "-c", text]
    environment = os.environ | {"FORBIDDEN_TOKENS": "1,2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    if "print(" in text:
        assert done.stdout.strip()


@pytest.mark.engine
def test_the_other_processor_has_the_last_word_in_a_real_engine(family, tmp_path):
    """Tokens that a strong control would choose are not chosen where it forbids them."""
    page = (ROOT / "docs" / "processors.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    (entry,) = [
        yaml.safe_load(t) for t in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]
    (tmp_path / "house_rules.py").write_text(program, encoding="utf-8")
    model = {"model": str(family.a), "args": ENGINE, "env": engine_environment(0)}

    def answer(directory: Path, **changes) -> list[int]:
        config = {"controls": {"manners": str(family.control)}, "tables": str(tmp_path / "tables")}
        directory.mkdir()
        config["models"] = {"m": model | changes}
        with gateway(directory, config) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            options = {
                "control": {"name": "manners", "strength": 4},
                "return_token_ids": True,
                "ignore_eos": True,
            }
            made = client.completions.create(
                model="m", prompt=[5, 6], max_tokens=20, temperature=0, extra_body=options
            )
            return made.choices[0].token_ids

    chosen = answer(tmp_path / "without")
    forbidden = ",".join(map(str, sorted({*chosen})))
    own = {"PYTHONPATH": str(tmp_path), "FORBIDDEN_TOKENS": forbidden}
    assert own.keys() == entry["models"]["m"]["env"].keys()
    changes = {"processors": entry["models"]["m"]["processors"], "env": model["env"] | own}
    other = answer(tmp_path / "with", **changes)
    assert len(other) == 20
    assert not {*other} & {*chosen}
