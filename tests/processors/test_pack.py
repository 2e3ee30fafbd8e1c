"""The manifest of a control."""

from __future__ import annotations

import json

import pytest

from trimtab_processors.pack import MANIFEST, Component, Pack, PackError, load_pack


def test_a_directory_without_a_manifest_is_a_control_with_the_defaults(tmp_path):
    """So that a model published without one works as it is."""
    assert load_pack(str(tmp_path)) == Pack(components=(Component(model=str(tmp_path)),))
    assert load_pack("somebody/deltamodel-15M").components == (Component(model="somebody/deltamodel-15M"),)


def test_a_pack_comes_back_as_it_was_saved(tmp_path):
    """With its components resolved: a directory in the pack, or a hub id."""
    (tmp_path / "expert").mkdir()
    pack = Pack(
        name="manners",
        strength=0.5,
        components=(Component(model="expert"), Component(model="some/anti-expert", weight=-1.0)),
    )
    pack.save(tmp_path)
    loaded = load_pack(str(tmp_path))
    assert [c.model for c in loaded.components] == [str(tmp_path / "expert"), "some/anti-expert"]
    assert loaded.model_copy(update={"components": pack.components}) == pack


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        ({"strenght": 1}, "strenght"),
        ({"strength": 11}, "strength"),
        ({"name": "a/b"}, "name"),
        ({"components": []}, "component"),
        ({"components": [{"model": ".", "wieght": 1}]}, "wieght"),
    ],
)
def test_a_wrong_manifest_is_refused_by_file_and_key(tmp_path, manifest, named):
    """A misspelt key must not go unnoticed."""
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(PackError, match=rf"{MANIFEST}.*{named}"):
        load_pack(str(tmp_path))


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
    """With the file's name."""
    (tmp_path / MANIFEST).write_text("name: manners")
    with pytest.raises(PackError, match=MANIFEST):
        load_pack(str(tmp_path))
