"""`trimtab serve` without a file: models named on the command line, or the small world."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from trimtab_server.cli import app
from trimtab_server.config.inline import WORLD, WORLD_SEED
from trimtab_training.world.world import World


@pytest.fixture
def serve(monkeypatch):
    """Run `trimtab serve` with these words; returns its result, and the settings that it would serve."""
    served = []
    monkeypatch.setattr(
        "trimtab_server.server.run_gateway", lambda settings, verbose: served.append(settings)
    )

    def serve(*words: str):
        result = CliRunner().invoke(app, ["serve", *words])
        return result, served[-1] if served else None

    return serve


def test_models_and_a_control_are_called_by_their_own_names(serve, tmp_path, pack):
    (tmp_path / "models" / "small").mkdir(parents=True)
    words = ("--model", str(tmp_path / "models" / "small"), "--model", "org/large", "--control", str(pack))
    result, settings = serve(*words, "--host", "192.0.2.1", "--port", "9000")
    assert result.exit_code == 0, result.output
    assert {name: model.model for name, model in settings.models.items()} == {
        "small": str(tmp_path / "models" / "small"),
        "large": "org/large",
    }
    assert settings.controls == {"inside": str(pack)}
    assert (settings.host, settings.port) == ("192.0.2.1", 9000)


def test_a_pack_without_a_name_is_called_by_its_directory(serve, bare_pack):
    assert set(serve("--model", "org/m", "--control", str(bare_pack))[1].controls) == {bare_pack.name}


def test_names_can_be_given(serve, pack):
    _, settings = serve("--model", "a=org/m", "--model", "b=org/m", "--control", f"c={pack}")
    assert list(settings.models) == ["a", "b"]
    assert list(settings.controls) == ["c"]


@pytest.mark.parametrize(("build", "args"), [("pip", {"enforce-eager": True}), ("no-such-package", {})])
def test_models_start_uncompiled_on_vllms_cpu_build_alone(serve, monkeypatch, build, args):
    monkeypatch.setattr("trimtab_server.config.inline._CPU_BUILD", build)
    assert serve("--model", "org/m")[1].models["m"].args == args


def test_relative_paths_start_here(serve, tmp_path, monkeypatch):
    (tmp_path / "m=1").mkdir()
    monkeypatch.chdir(tmp_path)
    result, _ = serve("--model", "./m=1")
    assert "--model" not in result.output
    assert "models.m=1: String should match pattern" in result.output
    assert serve("--model", "m=./m=1")[1].models["m"].model == str(tmp_path / "m=1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model", "a/m", "--model", "b/m"],
            "--model b/m: the name 'm' is that of a/m already; give another:",
        ),
        (["--control", "c"], "--control needs a --model"),
        (["--model", "./missing"], "models.missing.model: there is no "),
        (["some.yaml", "--model", "m"], "some.yaml and --model or --control: either the file says what is"),
        (["some.yaml"], "some.yaml can't be read"),
    ],
)
def test_what_can_not_be_meant_is_an_error(serve, words, said):
    result, settings = serve(*words)
    assert (result.exit_code, settings) == (2, None)
    assert said in result.output


def test_two_packs_of_one_name_are_an_error(serve, pack):
    result, _ = serve("--model", "m", "--control", str(pack), "--control", str(pack))
    assert result.exit_code == 2
    assert "the name 'inside' is that of" in result.output


def test_host_and_port_come_before_the_file(serve, write_config):
    path = str(write_config({"models": {"m": {"model": "x"}}, "port": 1}))
    assert serve(path, "--port", "2")[1].port == 2


def test_without_anything_the_small_world_is_served(serve, monkeypatch, tmp_path):
    """Where `trimtab demo` makes it too, so that it is made once."""
    asked = []
    world = World(
        directory=tmp_path / "world", key="k", seed=1, people=(), trained=0, settings={}, seconds=0,
        recall={"a": 1.0, "b": 1.0},
    )  # fmt: skip
    for path in (*world.models.values(), world.control):
        path.mkdir(parents=True)
    monkeypatch.setattr(
        "trimtab_training.world.cli.make_visibly", lambda *given: asked.append(given) or world
    )
    monkeypatch.setenv("TRIMTAB_LOG_LEVEL", "error")
    result, settings = serve("--port", "9000")
    assert result.exit_code == 0, result.output
    assert asked == [(WORLD, WORLD_SEED)]
    assert {name: model.model for name, model in settings.models.items()} == {
        name: str(path) for name, path in world.models.items()
    }
    assert settings.controls == {"manners": str(world.control)}
    assert (settings.port, settings.log_level) == (9000, "error")


def test_the_world_is_that_of_the_demo():
    import inspect

    from trimtab_training.demo.demo import demo

    defaults = {name: value.default for name, value in inspect.signature(demo).parameters.items()}
    assert (defaults["directory"], defaults["seed"]) == (WORLD, WORLD_SEED)
