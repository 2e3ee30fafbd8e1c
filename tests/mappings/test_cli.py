"""`trimtab map`, and how little the package needs before it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import hand_made
from trimtab_mappings import MappingTable, build_table, load_encoder
from trimtab_mappings.cli import app

TEXT = "The cat sat on the mat, and the dog didn't. hello world\n"


@pytest.fixture(scope="module")
def directories(gpt2_like, llama_like, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    gpt2_like.tokenizer.save_pretrained(root / "target")
    llama_like.tokenizer.save_pretrained(root / "control")
    return {"target": str(root / "target"), "control": str(root / "control")}


@pytest.fixture(scope="module")
def both(directories):
    return [part for side, path in directories.items() for part in (f"--{side}", path)]


@pytest.fixture(scope="module")
def built(both, tmp_path_factory):
    """A table in a file, and the output of the command that built it."""
    path = tmp_path_factory.mktemp("tables") / "table.safetensors"
    return path, run("build", *both, "--output", path).stdout


@pytest.fixture
def path(built):
    return built[0]


@pytest.fixture
def table(path):
    return MappingTable.load(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def found(*arguments, status=0):
    return json.loads(run(*arguments, "--json", status=status).stdout)


def test_build_writes_a_table_and_says_what_it_built(built, gpt2_like, llama_like, directories):
    path, output = built
    table = MappingTable.load(path)
    table.check(gpt2_like.vocabulary, llama_like.vocabulary)
    assert (table.target_name, table.control_name) == tuple(directories.values())
    assert output.startswith(f"{path}: {len(table.mapping)} rows in ")
    counts = [
        line.split()[1]
        for line in output.splitlines()
        if line.split()[:1] in [[k] for k in table.coverage._fields]
    ]
    assert counts == [str(count) for count in table.coverage]


@pytest.mark.parametrize("strategy", ["exact", "first-segment", "pm-mined"])
def test_build_takes_a_strategy(both, gpt2_like, llama_like, tmp_path, strategy):
    output = tmp_path / "table.safetensors"
    run("build", *both, "--strategy", strategy, "--output", output)
    expected = build_table(gpt2_like.encoder, llama_like.encoder, strategy)
    table = MappingTable.load(output)
    assert table.strategy == strategy
    assert table.mapping.tolist() == expected.mapping.tolist()


def test_show_summarizes_a_table(path, table):
    summary = found("show", path, "--worst", 3)
    assert summary["coverage"] == table.coverage._asdict()
    assert summary["uses"] is None
    assert len(summary["worst"]) == 3
    output = run("show", path).stdout
    assert f"target tokens: {len(table.mapping)}" in output
    assert "The worst rows, by distance" in output


def test_show_weighs_a_table_by_a_text(path, text, gpt2_like):
    summary = found("show", path, "--text", text)
    assert sum(summary["uses"].values()) == len(gpt2_like.encoder.encode(TEXT.encode())[0])
    assert "The worst rows, by distance times uses" in run("show", path, "--text", text).stdout


@pytest.mark.parametrize("side", ["target", "control"])
def test_show_finds_a_tokenizer_where_it_is_now(path, text, directories, tmp_path, side):
    (tmp_path / "moved").symlink_to(directories[side])
    moved = found("show", path, "--text", text, f"--{side}", tmp_path / "moved")
    assert moved == found("show", path, "--text", text)
    (other,) = (directory for name, directory in directories.items() if name != side)
    refusal = run("show", path, "--text", text, f"--{side}", other, status=2)
    assert f"its {side} is" in refusal.stderr


@pytest.fixture
def coarse(tmp_path):
    """A table whose control has words whole that its target spells in letters, and its converse."""
    sides = {"letters": hand_made.letters(), "words": hand_made.words()}
    for name, side in sides.items():
        side.tokenizer.save_pretrained(tmp_path / name)
    encoders = {name: load_encoder(str(tmp_path / name)) for name in sides}
    tables = {"coarser": ("letters", "words"), "finer": ("words", "letters")}
    for name, (target, control) in tables.items():
        table = build_table(encoders[target], encoders[control])
        table.save(tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in tables}


@pytest.mark.parametrize("weighed", [False, True])
def test_show_warns_of_a_coarser_control(coarse, tmp_path, weighed):
    (tmp_path / "sure.txt").write_text("SureooSorry", encoding="utf-8")
    options = ["--text", tmp_path / "sure.txt"] if weighed else []
    output = run("show", coarse["coarser"], *options).stdout
    text = "50.0% of the control's tokens in this text (2 of 4)"
    share = text if weighed else "53.3% of the control's tokens (8 of 15)"
    assert (
        f"warning: the control's vocabulary is coarser than the target's, which spells {share} in" in output
    )
    assert ("--text FILE" in output) is not weighed
    summary = found("show", coarse["coarser"], *options)
    assert summary["coarser"] is True
    uses = {"part": 2, "whole": 4} if weighed else None
    assert summary["control_in_pieces"] == {"tokens": {"part": 8, "whole": 15}, "uses": uses}
    run("show", coarse["coarser"], *options, "--html", tmp_path / "page.html")
    assert f"which spells {share[:5]} of" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_show_does_not_warn_of_a_finer_control(coarse, tmp_path):
    (tmp_path / "sure.txt").write_text("SureooSorry", encoding="utf-8")
    for options in ([], ["--text", tmp_path / "sure.txt"]):
        output = run("show", coarse["finer"], *options).stdout
        assert "warning" not in output
        assert "Tokens that the other side has not, and spells in pieces" in output
        summary = found("show", coarse["finer"], *options)
        assert (summary["coarser"], summary["control_in_pieces"]["tokens"]["part"]) == (False, 0)
        assert summary["target_in_pieces"]["tokens"] == {"part": 8, "whole": 15}


def test_show_needs_no_heavy_library(path):
    program = (
        "import sys; from trimtab_mappings.cli import app; app(['show', sys.argv[1]], standalone_mode=False);"
        " print(*{'torch', 'transformers', 'tokenizers', 'vllm'} & {*sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == ""
    assert "Coverage" in result.stdout


def test_lookup_shows_where_tokens_go(path, table):
    first, second = found("lookup", path, " world", "#65", "--near", 2)
    assert first["row"]["target"]["bytes"]["text"] == " world"
    assert second["row"]["target"]["id"] == 65
    assert first["row"]["control"]["id"] == table.mapping[first["row"]["target"]["id"]]
    assert len(first["near"]) <= 2
    output = run("lookup", path, " world").stdout
    assert '" world"' in output
    assert "the control spells it " in output


def test_lookup_of_a_token_that_there_is_not_is_refused(path):
    assert "error: no token 'nowhere'" in run("lookup", path, "nowhere", status=2).stderr


def test_diff_tells_alike_from_different_as_diff_does(path, both, tmp_path):
    assert found("diff", path, path)["changes"] == []
    assert "The two tables are alike" in run("diff", path, path).stdout
    other = tmp_path / "exact.safetensors"
    run("build", *both, "--strategy", "exact", "--output", other)
    difference = found("diff", path, other, status=1)
    assert len(difference["changes"]) == sum(difference["kinds"].values()) > 0
    assert "Rows that differ, by kind" in run("diff", path, other, status=1).stdout


def test_check_accepts_a_table_of_these_two_and_no_other(path, both, directories):
    assert found("check", path, *both)["strategy"] == "pm-mined"
    assert f"{path} is whole, and for these two" in run("check", path, *both).stdout.replace("\n", "")
    other = ["--target", directories["control"], "--control", directories["control"]]
    refusal = run("check", path, *other, status=2).stderr
    assert f"error: mapping table {path}: its target is '{directories['target']}'" in refusal
    assert "trimtab map build" in refusal
    swapped = ["--target", directories["control"], "--control", directories["target"]]
    refusal = run("check", path, *swapped, status=2).stderr
    assert f"error: mapping table {path}: the target and the control are swapped: " in refusal
    assert "trimtab map build" not in refusal


def test_build_does_not_replace_a_file_that_is_no_table(both, tmp_path):
    model = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, model, {"format": "pt"})
    before = model.read_bytes()
    refusal = run("build", *both, "--output", model, status=2).stderr
    assert f"error: {model} is a file that is no mapping table, and is not replaced" in refusal
    assert model.read_bytes() == before


def test_build_replaces_a_table(built, both, tmp_path):
    output = tmp_path / "table.safetensors"
    output.write_bytes(built[0].read_bytes()[:-1])
    run("build", *both, "--output", output)
    MappingTable.load(output)


def test_a_page_does_not_replace_a_file_that_is_no_page(path, tmp_path):
    before = path.read_bytes()
    refusal = run("show", path, "--html", path, status=2).stderr
    assert f"error: {path} is a file that is no page, and is not replaced" in refusal
    assert path.read_bytes() == before
    for _ in range(2):
        run("show", path, "--html", tmp_path / "page.html")


def test_build_and_check_warn_of_a_side_without_an_end(directories, gpt2_like, tmp_path):
    backend = Tokenizer.from_str(gpt2_like.tokenizer.backend_tokenizer.to_str())
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "endless")
    sides = ["--target", tmp_path / "endless", "--control", directories["control"]]
    table = ["--output", tmp_path / "table.safetensors"]
    lack = "has no eos token (of the roles it has: unk), so that a control has no say in where an answer ends"
    warning = f"the target '{tmp_path / 'endless'}' {lack}"
    assert f"warning: {warning}" in run("build", *sides, *table).stdout
    for arguments in (["build", *sides, *table], ["check", table[1], *sides]):
        assert [each[: len(warning)] for each in found(*arguments)["warnings"]] == [warning]


def test_build_and_check_do_not_warn_of_sides_with_an_end(path, both, tmp_path):
    assert found("build", *both, "--output", tmp_path / "table.safetensors")["warnings"] == []
    assert found("check", path, *both)["warnings"] == []


def test_score_puts_every_strategy_beside_the_table_s(path, text):
    result = found("score", path, "--text", text)
    scores = {score["strategy"]: score["accuracy"] for score in result["scores"]}
    assert list(scores) == ["pm-mined", "exact", "first-segment"]
    assert scores["exact"] <= min(scores["pm-mined"], scores["first-segment"])
    assert "pm-mined is the table's own strategy" in run("score", path, "--text", text).stdout


def test_score_refuses_another_tokenizer(path, text, directories):
    refusal = run("score", path, "--text", text, "--target", directories["control"], status=2)
    assert "its target is" in refusal.stderr


@pytest.mark.parametrize("command", ["show", "lookup", "diff", "check", "score", "build"])
def test_every_command_writes_a_page(command, path, both, text, tmp_path):
    page = tmp_path / "page.html"
    arguments = {
        "show": [path, "--text", text],
        "lookup": [path, " world"],
        "diff": [path, path],
        "check": [path, *both],
        "score": [path, "--text", text],
        "build": [*both, "--output", tmp_path / "table.safetensors"],
    }[command]
    result = run(command, *arguments, "--html", page)
    assert result.stdout == ""
    assert f"wrote {page}" in result.stderr.replace("\n", "")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("command", ["show", "lookup", "diff", "check", "score"])
def test_a_file_that_is_no_table_is_refused_by_every_command(command, both, text, tmp_path):
    path = tmp_path / "table.safetensors"
    path.write_bytes(b"rubbish")
    rest = {"lookup": ["a"], "diff": [path], "check": both, "score": ["--text", text]}.get(command, [])
    refusal = run(command, path, *rest, status=2).stderr
    assert f"error: mapping table {path}: can't be read" in refusal


def test_a_strategy_that_there_is_not_is_refused(both, tmp_path):
    refusal = run("build", *both, "--strategy", "best", "--output", tmp_path / "a", status=2)
    assert "error: no strategy 'best', there are: pm-mined, exact, first-segment" in refusal.stderr


def test_a_directory_without_a_tokenizer_ends_in_a_message(directories, tmp_path):
    sides = ["--target", tmp_path, "--control", directories["control"]]
    refusal = run("build", *sides, "--output", tmp_path / "table.safetensors", status=2)
    assert f"error: no tokenizer can be loaded from '{tmp_path}'" in refusal.stderr


def test_a_file_that_can_not_be_written_ends_in_a_message(both, tmp_path):
    (tmp_path / "file").write_text("")
    refusal = run("build", *both, "--output", tmp_path / "file" / "table.safetensors", status=2)
    assert "error: " in refusal.stderr
    assert str(tmp_path / "file") in refusal.stderr


@pytest.mark.parametrize("module", ["trimtab_mappings", "trimtab_mappings.cli"])
def test_importing_loads_no_heavy_library(module):
    heavy = {"torch", "transformers", "tokenizers", "xgrammar", "vllm", "fastapi"}
    program = f"import sys, {module}; print(*{heavy} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
