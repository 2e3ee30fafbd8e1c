"""The benchmarks run, print a table and end in a line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from miniature import miniature
from reference import Model, Reference
from trimtab_mappings import build_table, load_encoder
from trimtab_training.world.corpus import HARD
from trimtab_training.world.world import make_world

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


@pytest.fixture
def reference_decoder(family, monkeypatch):
    """Makes the loop that we are measured against, for one of the family's targets."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from reference_decoding import CachedModel, ReferenceDecoder

    def make(target):
        served, encoder = load_encoder(str(target)), load_encoder(str(family.control))
        models = CachedModel(str(target)), CachedModel(str(family.control))
        return ReferenceDecoder(*models, served.vocabulary, encoder, build_table(served, encoder))

    return make


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_loop_that_we_are_measured_against_chooses_the_slow_reference_s_tokens(
    family, reference_decoder, name
):
    decoder = reference_decoder(family.targets[name])
    slow = Reference(Model(family.targets[name]), Model(family.control))
    prompt = slow.target.tokenizer("bamo gide").input_ids
    own_prompt = decoder.control_prompt(prompt)
    assert own_prompt == slow.control.tokenizer("bamo gide").input_ids
    decoded = decoder.decode(prompt, own_prompt, 60, greedy=True)
    assert decoded.step > 0
    assert decoded.realignments > 0 or name == "a"
    for token, step in zip(decoded.tokens, slow.steps(prompt, own_prompt, 1.0, decoded.tokens), strict=True):
        assert token == step.token or step.gap < 1e-4


def test_the_loop_that_we_are_measured_against_samples_as_many_tokens(family, reference_decoder):
    decoded = reference_decoder(family.b).decode([5, 6], [7], 40, greedy=False)
    assert len(decoded.tokens) == 40


def test_growth_measures_both_tokenizers_and_draws_a_plot(tmp_path):
    pytest.importorskip("mistral_common", reason="mistral_common ships the real tokenizers")
    plot = tmp_path / "growth.svg"
    found = last_line("growth.py", "--plot", plot, "--shape", "tiny", "--tokens", 128, "--rounds", 1)
    for name, bins in found["results"].items():
        assert [each["alignment"] > 0 < each["forward"] for each in bins] == [True, True]
        assert all((each["realignment"] is None) == (name == "same tokenizer") for each in bins)
    drawing = ET.fromstring(plot.read_text(encoding="utf-8"))  # noqa: S314 - our own
    lines = [line.get("points").split() for line in drawing.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [2, 2, 2, 2, 2]


def test_alignments_compares_segments_with_retokenize_on_a_small_world_and_on_prose(tmp_path):
    world = make_world(tmp_path / "world", 5, settings=miniature(), jobs=1)
    text = tmp_path / "text.txt"
    text.write_text("the cats sat on the mats, and the dogs did not sit\n" * 20, encoding="utf-8")
    prose = ("--training", text, "--text", text, "--steps", 2, "--pieces", 2)
    pairs = ("byte-level-270:byte-level-270", "byte-level-270:word-piece-60")
    options = [argument for pair in pairs for argument in ("--pair", pair)]
    found = last_line("alignments.py", "--world", world.directory, *prose, *options)
    a, b, c = found["world"]
    assert a["departure"] | {"steps": 0} == {"steps": 0, "kl_mean": 0, "kl_p99": 0, "same_choice": 1}
    assert a["same_answers"] == a["same_tokens"] == 1
    assert a["other_contexts"] == 0
    assert all(0 <= each["same_tokens"] <= 1 and each["departure"]["steps"] > 0 for each in (b, c))
    equal, unlike = found["prose"]
    assert equal["other_tokens"] == equal["everywhere"]["kl_mean"] == equal["where_other"]["steps"] == 0
    assert 0 < unlike["other_tokens"] <= 1
    assert 0 < unlike["where_other"]["steps"] < unlike["everywhere"]["steps"]
    assert 0 < unlike["everywhere"]["kl_mean"] < unlike["everywhere"]["kl_p99"]


def test_routings_are_measured_on_every_target_and_drawn(tmp_path, monkeypatch):
    """Two seeds in which all went alike: a spread of nothing."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import routings

    world = make_world(tmp_path / "world", 5, settings=miniature(dialect=HARD), jobs=1)
    results = [*routings.measure("hard", world, ["exact", "pm-mined"])] * 2
    assert [*dict.fromkeys((result.target, result.routing) for result in results)] == [
        ("a", "without"), ("a", "ceiling"),
        ("b", "without"), ("b", "exact"), ("b", "pm-mined"),
        ("c", "without"), ("c", "exact"), ("c", "pm-mined"),
    ]  # fmt: skip
    assert all(result.figures[routings.LOSS] > 0 for result in results)
    assert len(routings.markdown(results).splitlines()) == 2 + 13
    drawing = ET.fromstring(routings.chart("hard", routings.of(results, strength=1.0)))  # noqa: S314 - our own
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}rect"))) == 5


def test_routings_are_measured_on_prose(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cats sat on the mats, and the dogs did not sit\n" * 20, encoding="utf-8")
    prose = [option for name in ("--base", "--lessons", "--text") for option in (name, text)]
    tokenizers = ("--target", "byte-level-290", "--control", "byte-level-270")
    found = last_line("routings_on_text.py", *prose, *tokenizers, "--steps", 2, "--pieces", 2)
    losses = {(each["model"], each["routing"], each["strength"]): each["loss"] for each in found["results"]}
    assert losses["target", "exact", 0.0] == losses["target", "pm-mined", 0.0]
    assert losses["template", "", 1.0] != losses["template", "", 0.0] > 0
    assert losses["target", "path", 1.0] != losses["target", "path", 0.0] > 0


def test_what_a_routing_adds_behind_the_logits_is_timed_for_each():
    pytest.importorskip("mistral_common", reason="mistral_common ships the real tokenizers")
    found = last_line("apply.py", "--width", 2000, "--batch", 2, "--rounds", 2)
    (result,) = found["results"]
    assert result["nodes"] > 0
    assert min(result[f"{name}_ms"] for name in ("pm_mined", "path", "pieces", "largest")) > 0


def test_the_divergence_is_timed_beside_adding_the_shift():
    found = last_line("divergence.py", "--width", 1000, "--batch", 2, "--rounds", 2)
    (result,) = found["results"]
    assert result["step_ms"] * found["every"] == result["divergence_ms"] > 0
    assert result["add_ms"] > 0
