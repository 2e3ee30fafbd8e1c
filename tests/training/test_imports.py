"""Which parts of the training import which: neither the world nor the demo is needed for real models."""

from __future__ import annotations

import pytest

from imports import TRAINING, training_imports

PARTS = {
    "control": {"recipe_file", "openai_api"},
    "evaluation": {"recipe_file", "openai_api"},
    "similarity": {"evaluation", "recipe_file"},
    "world": {"control"},
    "demo": {"world"},
}
"""Of each package, what else of the training it may import."""


def test_every_package_of_the_training_is_named_here():
    assert {path.parent.name for path in TRAINING.glob("*/__init__.py")} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part):
    wrong = {
        f"{source.relative_to(TRAINING)}: {module}"
        for source in (TRAINING / part).rglob("*.py")
        for module in training_imports(source)
        if module.split(".")[0] not in {part, *PARTS[part]}
    }
    assert wrong == set()


def test_what_all_parts_share_imports_none_of_them():
    assert {module for source in TRAINING.glob("*.py") for module in training_imports(source)} == set()
