"""What a request may say to the plugin."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trimtab_processors.parameters import Parameters, ParametersError, parse_xargs, to_xargs


def test_a_request_that_says_nothing_to_trimtab_has_no_control():
    """Keys of other processors are theirs."""
    assert parse_xargs(None) is None
    assert parse_xargs({"other": 1}) is None


def test_parameters_come_back_from_what_the_gateway_writes():
    """Flat keys and plain types; what is absent is not written."""
    full = Parameters(control="manners", strength=0.5, prompt=(1, 2))
    assert to_xargs(full) == {
        "trimtab_control": "manners",
        "trimtab_strength": 0.5,
        "trimtab_prompt": [1, 2],
    }
    for parameters in (full, Parameters(control="manners")):
        assert parse_xargs({"other": 1} | to_xargs(parameters)) == parameters


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"trimtab_strength": 1.0}, "trimtab_control"),
        ({"trimtab_control": ""}, "trimtab_control"),
        ({"trimtab_control": 3}, "trimtab_control"),
        ({"trimtab_control": "../x"}, "trimtab_control"),
        ({"trimtab_control": "x", "trimtab_strength": 10.5}, "trimtab_strength"),
        ({"trimtab_control": "x", "trimtab_strength": float("nan")}, "trimtab_strength"),
        ({"trimtab_control": "x", "trimtab_strength": "strong"}, "trimtab_strength"),
        ({"trimtab_control": "x", "trimtab_prompt": [-1]}, "trimtab_prompt"),
        ({"trimtab_control": "x", "trimtab_prompt": [1.5]}, "trimtab_prompt"),
        ({"trimtab_control": "x", "trimtab_prompt": "text"}, "trimtab_prompt"),
        ({"trimtab_control": "x", "trimtab_colour": "red"}, "trimtab_colour"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(xargs, named):
    """Unknown keys too: a misspelt one must not go unnoticed."""
    with pytest.raises(ParametersError, match=named):
        parse_xargs(xargs)


def test_the_front_end_loads_parameters_and_settings_without_torch_or_vllm():
    """They are imported in every vLLM front end."""
    code = (
        "import sys, trimtab_processors.parameters, trimtab_processors.settings;"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
