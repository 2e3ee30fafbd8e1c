"""What a request may say to the plugin."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from trimtab_processors.parameters import Parameters, ParametersError, parse_xargs, to_xargs


def test_a_request_that_says_nothing_to_trimtab_has_no_control():
    """Keys of other processors are theirs."""
    assert parse_xargs(None) == ()
    assert parse_xargs({"other": 1}) == ()


def test_parameters_come_back_from_what_the_gateway_writes():
    """Flat keys and plain types; what is absent is not written."""
    full = Parameters(control="manners", strength=0.5, prompt=(1, 2), min_p=0.25, until=8, routing="path")
    assert to_xargs([full]) == {
        "trimtab_control": "manners",
        "trimtab_strength": 0.5,
        "trimtab_prompt": [1, 2],
        "trimtab_min_p": 0.25,
        "trimtab_until": 8,
        "trimtab_routing": "path",
    }
    for parameters in (full, Parameters(control="manners"), Parameters(control="manners", prompt=())):
        assert parse_xargs({"other": 1} | to_xargs([parameters])) == (parameters,)


@pytest.mark.parametrize("strengths", [(None, None, None), (0.5, -1.0, 2.0)])
@pytest.mark.parametrize("routings", [(None, None, None), ("pm-mined", None, "path")])
def test_several_controls_travel_as_lists(strengths, routings):
    """With a prompt of its own, an empty one, and none."""
    several = tuple(
        Parameters(
            control=name,
            strength=strength,
            prompt=prompt,
            top_k=top_k,
            min_p=min_p,
            until=until,
            routing=routing,
        )
        for name, strength, prompt, top_k, min_p, until, routing in zip(
            *(["a", "b", "c"], strengths, [(1, 2), None, ()]),
            *([None, 5, None], [0.5, None, 1.0], [None, None, 9], routings),
            strict=True,
        )
    )
    xargs = to_xargs(several)
    assert all(
        type(value) is list and {type(item) for item in value} <= {str, int, float}
        for value in xargs.values()
    )
    assert parse_xargs(xargs) == several


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"trimtab_strength": 1.0}, "trimtab_strength: 1 values for 2 controls"),
        ({"trimtab_top_k": [1, 2, 3]}, "trimtab_top_k: 3 values for 2 controls"),
        ({"trimtab_routing": ["path"]}, "trimtab_routing: 1 values for 2 controls"),
        (
            {"trimtab_routing": ["path", "x"]},
            "trimtab_routing.1: Input should be 'pm-mined', 'path', 'pieces'",
        ),
        ({"trimtab_prompt": [1]}, "trimtab_prompt_lengths: needed, since 2 controls share the prompt"),
        ({"trimtab_prompt": [1], "trimtab_prompt_lengths": [1, 1]}, "they add up to 2, not to 1"),
        ({"trimtab_prompt_lengths": [1, 1]}, "they add up to 2, not to 0"),
        ({"trimtab_control": ["x", "x"]}, "a control stands twice in"),
        ({"trimtab_control": []}, "trimtab_control"),
        ({"trimtab_control": [f"x{i}" for i in range(9)]}, "trimtab_control"),
        ({"trimtab_strength": [1.0, float("nan")]}, "trimtab_strength.1"),
    ],
)
def test_lists_that_do_not_fit_together_are_refused(more, said):
    with pytest.raises(ParametersError, match=re.escape(said)):
        parse_xargs({"trimtab_control": ["x", "y"]} | more)


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
        ({"trimtab_control": "x", "trimtab_routing": "path-1x2"}, "trimtab_routing"),
        ({"trimtab_control": "x", "trimtab_routing": 1}, "trimtab_routing"),
        ({"trimtab_control": "x", "trimtab_min_p": 1.5}, "trimtab_min_p"),
        ({"trimtab_control": "x", "trimtab_min_p": float("nan")}, "trimtab_min_p"),
        ({"trimtab_control": "x", "trimtab_until": -1}, "trimtab_until"),
        ({"trimtab_control": "x", "trimtab_until": 1.5}, "trimtab_until"),
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
