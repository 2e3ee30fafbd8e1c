"""The environment before the file; and what is published of the keys: the schema, and the page about them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from trimtab_server.cli import app
from trimtab_server.config.schema import (
    ModelSettings,
    Settings,
    load_settings,
    make_settings,
    settings_schema,
)
from trimtab_server.config.sections import Cors, Limits, ReplicaSettings, Restarts, Timeouts, Tls
from trimtab_server.config.types import SettingsError

ONE = {"models": {"m": {"model": "org/name"}}}
DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")


@pytest.fixture
def load(write_config, monkeypatch):
    """Load a configuration, by default with one model, under these variables."""

    def load(config: dict = ONE, options: dict | None = None, **variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load_settings(write_config(config), options)

    return load


# The environment


def test_the_environment_comes_before_the_file_and_an_option_before_both(load):
    assert load({**ONE, "port": 1}).port == 1
    assert load({**ONE, "port": 1}, TRIMTAB_PORT="2").port == 2
    assert load({**ONE, "port": 1}, {"port": 3}, TRIMTAB_PORT="2").port == 3


def test_two_underscores_lead_into_a_section_and_leave_its_other_keys(load):
    timeouts = load({**ONE, "timeouts": {"stop": 1}}, TRIMTAB_TIMEOUTS__DRAIN="5").timeouts
    assert (timeouts.drain, timeouts.stop, timeouts.probe) == (5, 1, 5)


def test_a_key_comes_before_its_section(load):
    limits = load(TRIMTAB_LIMITS__QUEUED="1", TRIMTAB_LIMITS="{queued: 2, concurrent: 3}").limits
    assert (limits.queued, limits.concurrent) == (1, 3)


def test_a_section_that_the_file_does_not_have_is_made(load):
    assert load(TRIMTAB_TLS__CERTFILE="/c.pem").tls.certfile == Path("/c.pem")


def test_a_section_can_be_taken_away(load):
    assert load({**ONE, "tls": {"certfile": "c"}}, TRIMTAB_TLS="null").tls is None


def test_models_are_merged_by_their_names_whatever_characters_these_have(load):
    file = {"models": {"org/a-b": {"model": "x", "args": {"seed": 1, "dtype": "half"}}, "c": {"model": "y"}}}
    models = load(file, TRIMTAB_MODELS='{"org/a-b": {args: {seed: 2}}, d: {model: z}}').models
    assert models["org/a-b"].args == {"seed": 2, "dtype": "half"}
    assert (models["c"].model, models["d"].model) == ("y", "z")


def test_lists_are_replaced(load):
    file = {**ONE, "cors": {"allow_origins": ["https://a"]}}
    assert load(file, TRIMTAB_CORS__ALLOW_ORIGINS="[https://b]").cors.allow_origins == ("https://b",)


@pytest.mark.parametrize("password", ["0123", "a: b", "[", "yes", "~"])
def test_a_text_is_taken_as_it_stands(load, password):
    settings = load({**ONE, "tls": {"certfile": "c"}}, TRIMTAB_TLS__KEYFILE_PASSWORD=password)
    assert settings.tls.keyfile_password.get_secret_value() == password


def test_null_stands_for_no_value(load):
    assert load({**ONE, "api_keys_file": "missing"}, TRIMTAB_API_KEYS_FILE="null").api_keys == frozenset()


def test_an_empty_variable_is_as_good_as_none(load):
    assert load({**ONE, "port": 1}, TRIMTAB_PORT="").port == 1


def test_keys_keep_their_variables_and_their_commas(load):
    settings = load(TRIMTAB_API_KEYS="a, b", TRIMTAB_ADMIN_KEYS="c")
    assert (settings.api_keys, settings.admin_keys) == ({"a", "b"}, {"c"})


def test_the_environment_is_enough(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_MODELS", "{m: {model: org/name}}")
    assert make_settings({}, "nothing", tmp_path).models["m"].model == "org/name"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "TRIMTAB_PROT",
            "1",
            "TRIMTAB_PROT: prot: unknown key; allowed here: admin_keys_file, api_keys_file",
        ),
        (
            "TRIMTAB_TIMEOUTS__STAT",
            "1",
            "TRIMTAB_TIMEOUTS__STAT: timeouts.stat: unknown key; allowed here: body",
        ),
        (
            "TRIMTAB_TIMEOUTS",
            "{stat: 1}",
            "TRIMTAB_TIMEOUTS: timeouts.stat: unknown key; allowed here: body",
        ),
        ("TRIMTAB_PORT", "x", "TRIMTAB_PORT: port: Input should be a valid integer"),
        ("TRIMTAB_PORT", "[", "TRIMTAB_PORT: port: not YAML: "),
        ("TRIMTAB_LOG_LEVEL", "loud", "TRIMTAB_LOG_LEVEL: log_level: Input should be 'debug', 'info'"),
        (
            "TRIMTAB_MODELS__M__MODEL",
            "x",
            "TRIMTAB_MODELS__M__MODEL: no variable leads below models; write the value in YAML:",
        ),
        (
            "TRIMTAB_PORT__X",
            "1",
            "TRIMTAB_PORT__X: no variable leads below port; write the value in YAML: TRIMTAB_PORT=",
        ),
        (
            "TRIMTAB_MODELS",
            "{m: {agrs: {}}}",
            "TRIMTAB_MODELS: models.m.agrs: unknown key; allowed here: args",
        ),
        ("TRIMTAB_MODELS", "{m: {}, m: {}}", "TRIMTAB_MODELS: models: not YAML: the key 'm' stands twice"),
    ],
)
def test_a_mistake_in_a_variable_is_named_with_the_variable_and_the_place(load, variable, value, said):
    with pytest.raises(SettingsError) as caught:
        load(**{variable: value})
    assert str(caught.value).splitlines()[1].strip().startswith(said)


def test_a_mistake_in_the_file_is_not_laid_to_a_variable_beside_it(load):
    with pytest.raises(SettingsError, match=r"\n  models\.m\.agrs: unknown key"):
        load({"models": {"m": {"model": "x", "agrs": {}}}}, TRIMTAB_MODELS="{m: {model: y}}")


def test_mistakes_of_the_file_and_of_variables_are_told_together(load):
    with pytest.raises(SettingsError) as caught:
        load({**ONE, "prot": 1}, TRIMTAB_PROT="2", TRIMTAB_PORT="x")
    assert len(str(caught.value).splitlines()) == 4


def test_an_option_is_named_as_it_is_written(load):
    with pytest.raises(SettingsError, match="--port: port: Input should be less than"):
        load(options={"port": 70000})


# The schema


def test_the_published_schema_is_that_of_the_code():
    """After a change: trimtab schema > docs/configuration.schema.json"""
    printed = CliRunner().invoke(app, ["schema"]).stdout
    assert (DOCS / "configuration.schema.json").read_text(encoding="utf-8") == printed
    jsonschema.Draft202012Validator.check_schema(json.loads(printed))


def test_every_key_of_the_schema_but_the_plugins_says_what_it_means():
    sections = {"": settings_schema(), **settings_schema()["$defs"]}
    sections.pop("PluginSettings")
    silent = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section["properties"].items()
        if not value.keys() & {"description", "$ref"}
    ]
    assert silent == []


@pytest.mark.parametrize(
    "wrong",
    [{"prot": 1}, {"port": "x"}, {"models": {"m": {"agrs": {}}}}, {"models": {"a b": {"model": "x"}}}],
)
def test_the_schema_finds_what_the_code_refuses(wrong):
    assert list(jsonschema.Draft202012Validator(settings_schema()).iter_errors({**ONE, **wrong}))


# The page


def keys(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, object]]:
    """The keys below a section that is in none of the tables by itself, and their defaults."""
    for name, field in section.model_fields.items():
        yield above + name, field.get_default(call_default_factory=True)


SECTIONS = {
    "": Settings,
    "models.NAME.": ModelSettings,
    "models.NAME.replicas[].": ReplicaSettings,
    "limits.": Limits,
    "timeouts.": Timeouts,
    "restarts.": Restarts,
    "cors.": Cors,
    "tls.": Tls,
}
ROWS = dict(re.findall(r"^\| `([^`|]+)` \| .+ \| (.+) \|$", PAGE, re.MULTILINE))


def test_the_page_has_every_key_and_no_other():
    plugin = {
        f"models.NAME.plugin.{name}" for name in settings_schema()["$defs"]["PluginSettings"]["properties"]
    }
    declared = {name for above, section in SECTIONS.items() for name, _ in keys(section, above)}
    sections = {above.removesuffix(".").removesuffix("[]") for above in SECTIONS} | {"models.NAME.plugin"}
    assert set(ROWS) == (declared | plugin) - sections | {"models", "models.NAME.replicas"}


@pytest.mark.parametrize("above", SECTIONS)
def test_the_page_says_the_default_of_every_number_text_and_truth(above):
    simple = {
        name: default
        for name, default in keys(SECTIONS[above], above)
        if isinstance(default, bool | int | float | str | Path)
    }
    assert {name: ROWS[name] for name in simple} == {name: f"`{_written(simple[name])}`" for name in simple}


def _written(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_every_example_of_the_page_is_a_configuration(load, text):
    config = yaml.safe_load(text)
    jsonschema.validate(config, settings_schema())
    assert load(config)
