"""The configuration: defaults, paths, and what is said of mistakes."""

from __future__ import annotations

import pytest

from trimtab_server.config.schema import load_settings
from trimtab_server.config.types import SettingsError
from trimtab_server.engines.vllm.flags import CONTROL_PROCESSOR, RUNNER_PROCESSORS

ONE = {"m": {"model": "org/name"}}


@pytest.fixture
def refusal(write_config):
    """What is said of a configuration, but for its first line."""

    def refusal(config: dict) -> str:
        path = write_config(config)
        with pytest.raises(SettingsError) as caught:
            load_settings(path)
        head, _, faults = str(caught.value).partition("\n")
        assert head == f"{path} is not a valid configuration:"
        return faults.strip()

    return refusal


def test_a_model_is_all_that_is_needed_and_nobody_else_can_reach_it(write_config):
    settings = load_settings(write_config({"models": ONE}))
    assert settings.host == "127.0.0.1"
    assert settings.models["m"].processors == (CONTROL_PROCESSOR,)
    for name in RUNNER_PROCESSORS:  # as it was called before
        model = {"model": "org/name", "processors": [name]}
        assert load_settings(write_config({"models": {"m": model}})).models["m"].processors == (
            CONTROL_PROCESSOR,
        )
    assert settings.api_keys == frozenset()
    assert settings.limits.body_bytes == 32 * 1024 * 1024


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"speculative_config": {"method": "ngram"}}, "models.m.args.speculative-config: vLLM's V1 model"),
        ({"spec-method": "ngram"}, "models.m.args.spec-method: vLLM's V1 model runner has no speculative"),
        ({"runner": "pooling"}, "models.m.args.runner: a pooling model generates nothing"),
        ({"convert": "embed"}, "models.m.args.convert: a pooling model generates nothing"),
    ],
)
def test_what_can_not_run_beside_a_control_is_refused_at_start(refusal, write_config, args, said):
    model = {"model": "org/name", "args": args}
    assert refusal({"models": {"m": model}, "controls": {"c": "org/c"}}).startswith(said)
    without = {"models": {"m": {**model, "controls": []}}, "controls": {"c": "org/c"}}
    assert load_settings(write_config(without)).controls_of("m") == {}
    assert refusal({"models": {"m": model}, "control_roots": ["/"]}).startswith(said)
    assert load_settings(write_config(without | {"control_roots": ["/"]})).can_steer("m") is False


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"env": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}, "models.m.env: VLLM_USE_V2_MODEL_RUNNER is set by"),
    ],
)
def test_there_is_one_way_to_choose_the_model_runner(refusal, model, said):
    assert refusal({"models": {"m": {"model": "org/name", **model}}}).startswith(said)


def test_a_routing_that_the_v2_model_runner_lacks_is_refused_at_start(refusal, write_config):
    models = {"m": {"model": "org/name", "runner": "v2", "plugin": {"routing": "pieces"}}}
    assert refusal({"models": models}).startswith(
        "models.m: plugin.routing 'pieces': vLLM's V2 model runner has"
    )
    models["m"]["plugin"]["routing"] = "pm-mined"
    assert load_settings(write_config({"models": models})).models["m"].plugin.routing == "pm-mined"


def test_the_v2_model_runner_decodes_speculatively(write_config):
    model = {"model": "org/name", "runner": "v2", "args": {"spec-method": "ngram"}}
    assert load_settings(write_config({"models": {"m": model}, "controls": {"c": "org/c"}}))


def test_relative_paths_start_at_the_file(write_config, tmp_path):
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "packs").mkdir()
    config = {"models": {"m": {"model": "models/m"}}, "controls": {"c": "./packs"}, "tables": "t"}
    settings = load_settings(write_config(config))
    assert settings.models["m"].model == str(tmp_path / "models" / "m")
    assert settings.controls["c"] == str(tmp_path / "packs")
    assert settings.tables == tmp_path / "t"


def test_home_is_understood(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings(write_config({"models": {"m": {"model": "~"}}, "tables": "~/t"}))
    assert settings.models["m"].model == str(tmp_path)
    assert settings.tables == tmp_path / "t"


def test_what_is_no_directory_is_a_hub_id(write_config):
    assert load_settings(write_config({"models": ONE})).models["m"].model == "org/name"


@pytest.mark.parametrize("place", ["./missing", "/no/such/place", "~/no/such/place"])
def test_a_path_that_leads_nowhere_is_no_hub_id(refusal, place):
    assert refusal({"models": {"m": {"model": place}}}).startswith("models.m.model: there is no /")


def test_numbers_may_stand_for_text_in_the_environment(write_config):
    config = {"models": {"m": {"model": "x", "env": {"VLLM_CPU_KVCACHE_SPACE": 1}}}}
    assert load_settings(write_config(config)).models["m"].env == {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "models: Field required"),
        ({"models": {}}, "models: Dictionary should have at least 1 item"),
        (
            {"models": ONE, "prot": 1},
            "prot: unknown key; allowed here: admin_keys_file, api_keys_file, control_roots, ",
        ),
        (
            {"models": {"m": {"model": "x", "agrs": {}}}},
            "models.m.agrs: unknown key; allowed here: args, command, controls, default_control, env, model",
        ),
        (
            {"models": ONE, "timeouts": {"stat": 1}},
            "timeouts.stat: unknown key; allowed here: body, connect, drain",
        ),
        (
            {"models": ONE, "limits": {"controls_per_request": 9}},
            "limits.controls_per_request: Input should be less than or equal to 8, got '9'",
        ),
        (
            {"models": ONE, "pass_through": ["/sleep", "/invocations"]},
            "pass_through.1: /invocations would bypass controls and limits, and can't be opened",
        ),
        ({"models": ONE, "timeouts": {"stop": 0}}, "timeouts.stop: Input should be greater than 0, got '0'"),
        (
            {"models": {"m": {"model": "x", "plugin": {"cache": 1}}}},
            "models.m.plugin.cache: unknown key; allowed here: cache_bytes, control_cpus, ",
        ),
        (
            {"models": {"m": {"model": "x", "plugin": {"tables": "t"}}}},
            "models.m.plugin: tables stand at the top of the configuration, not here",
        ),
        ({"models": ONE, "port": "x"}, "port: Input should be a valid integer"),
        ({"models": ONE, "log_level": "loud"}, "log_level: Input should be 'debug', 'info'"),
        ({"models": {"a b": {"model": "x"}}}, "models.a b: String should match pattern"),
        ({"models": {"m": {}}}, "models.m: `model` is needed, a directory or a hub id"),
        (
            {"models": {"m": {"model": "x", "processors": ["y"]}}},
            "models.m.processors.0: String should match",
        ),
        (
            {"models": {"m": {"model": "x", "args": {"max-model-len": None}}}},
            "models.m.args.max-model-len: the flag has no value: write true",
        ),
        (
            {"models": {"m": {"model": "x", "args": {"--seed": 1}}}},
            "models.m.args.--seed: '--seed' is no flag of vLLM's: write its name without the leading dashes",
        ),
        (
            {"models": {"m": {"model": "x", "controls": ["c"]}}, "controls": {"d": "y"}},
            "models.m.controls: no control 'c'; there is: d",
        ),
        (
            {"models": {"m": {"model": "x", "default_control": "c"}}},
            "models.m.default_control: no control 'c'; there is: none",
        ),
        (
            {
                "models": {"m": {"model": "x", "controls": ["d"], "default_control": "c"}},
                "controls": {"c": "y", "d": "y"},
            },
            "models.m.default_control: no control 'c'; there is: d",
        ),
        (
            {"models": ONE, "cors": {"allow_origins": ["https://a.example/"]}},
            "cors.allow_origins.0: String should match pattern",
        ),
        (
            {"models": ONE, "cors": {"allow_origins": ["*"], "allow_credentials": True}},
            "cors: allow_credentials: not for all origins",
        ),
        (
            {"models": ONE, "cors": {"allow_origin_regex": "("}},
            "cors.allow_origin_regex: not a regular expression",
        ),
        (
            {"models": ONE, "tls": {"certfile": "c", "require_client_certificate": True}},
            "tls: `require_client_certificate: true` and `ca_certs` go together",
        ),
        ({"models": ONE, "tls": {"certfile": "c", "ca_certs": "d"}}, "tls: `require_client_certificate"),
        (
            {"models": {"m": {"model": "x", "replicas": [{"device": 0}]}}},
            "models.m.replicas.0.device: unknown key; allowed here: admin_key_variable, args, cpus, ",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(refusal, config, said):
    assert refusal(config).startswith(said)


@pytest.mark.parametrize(
    "flag",
    ["uds", "port", "host", "model", "served_model_name", "logits-processors", "additional-config.trimtab"],
)
def test_flags_that_trimtab_sets_are_refused(refusal, flag):
    assert "Trimtab sets --" in refusal({"models": {"m": {"model": "x", "args": {flag: "y"}}}})


def test_all_mistakes_are_told_at_once(refusal):
    assert len(refusal({"prot": 1, "models": {"m": {"modle": "x"}}}).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [", "can't be read"),
        ("- a", "is not a mapping of settings"),
        ("", "is not a mapping of settings"),
        ("models: {a: {model: x}, a: {model: y}}", "the key 'a' stands twice"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"c\.yaml") as caught:
        load_settings(path)
    assert said in str(caught.value)


def test_anchors_and_merges_work(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("models:\n  a: &a {model: x, args: {seed: 1}}\n  b: {<<: *a, model: y}\n")
    models = load_settings(path).models
    assert (models["b"].model, models["b"].args) == ("y", {"seed": 1})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere.yaml can't be read"):
        load_settings(tmp_path / "nowhere.yaml")


def test_a_password_is_in_no_message_and_no_repr(refusal, write_config):
    tls = {"certfile": "c", "keyfile_password": "hunter2"}
    assert "hunter2" not in repr(load_settings(write_config({"models": ONE, "tls": tls})))
    assert "4711" not in refusal({"models": ONE, "tls": {**tls, "keyfile_password": 4711}})


@pytest.mark.parametrize("text", ["", "# only a comment\n", None])
def test_a_file_of_keys_without_a_key_locks_nobody_out_by_mistake(write_config, tmp_path, text):
    if text is not None:
        (tmp_path / "keys").write_text(text)
    settings = load_settings(write_config({"models": ONE, "api_keys_file": "keys"}))
    with pytest.raises(SettingsError, match="api_keys_file"):
        settings.api_keys  # noqa: B018 - reading it is what fails
