"""What can be said of the containers without an engine that runs them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trimtab_server.cli import app
from trimtab_server.routes import open_routes
from trimtab_server.settings import load_settings
from trimtab_training.families import FAMILIES
from trimtab_training.world import CONTROL, CONTROL_NAME

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"][
    "targets"
]
HOME = "/var/lib/trimtab"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, each on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole.splitlines())]


def arguments(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def packages(name: str) -> set[str]:
    """The packages of a file of requirements."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0] for line in lines if line and not line.startswith("#")}


def asked(command: str) -> tuple[int, str]:
    """The port and the path that a health check asks."""
    (found,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", command)
    return int(found[0]), found[1]


PORT = int(arguments("EXPOSE")[0])
OPEN_PATHS = {route.path for route in open_routes.routes}


class TestDockerfile:
    def test_every_path_that_it_copies_exists(self):
        sources = [s for rest in arguments("COPY") if "--from" not in rest for s in rest.split()[:-1]]
        assert sources
        assert [source for source in sources if not (ROOT / source).exists()] == []

    def test_the_lock_file_is_installed_as_it_stands_by_the_makefiles_uv(self):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        steps = "\n".join(arguments("RUN"))
        assert "--no-deps" in steps
        assert "-r requirements/cpu.txt" in steps
        assert re.findall(r"uv==[\d.]+", steps) == re.findall(r"uv==[\d.]+", makefile)

    def test_what_it_leaves_out_is_locked_and_no_dependency_of_the_project(self):
        excluded = packages("image-excludes.txt")
        needed = {re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]}
        assert excluded <= packages("cpu.txt")
        assert excluded & needed == set()

    def test_the_build_sees_the_packages_the_lock_and_nothing_else(self):
        first, *rest = [
            line
            for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
        ]
        tops = {package.split("/")[0] for package in WHEEL["wheel"]["packages"]}
        files = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
        assert first == "*"
        assert {line[1:] for line in rest if line.startswith("!")} == {*tops, *files, "requirements"}

    def test_the_image_runs_the_projects_command_as_nobody_special(self):
        (entry,) = (json.loads(rest) for rest in arguments("ENTRYPOINT"))
        assert entry[0] in PROJECT["scripts"]
        assert arguments("USER")[-1].split(":")[0].isdecimal()
        assert arguments("USER")[-1].split(":")[0] != "0"

    def test_its_health_check_asks_a_path_that_needs_no_key(self):
        port, path = asked(arguments("HEALTHCHECK")[0])
        assert (port, path) == (PORT, "/health")
        assert path in OPEN_PATHS


class TestCompose:
    @pytest.mark.parametrize("service", [name for name in SERVICES if "build" in SERVICES[name]])
    def test_our_image_is_named_after_the_version(self, service):
        assert SERVICES[service]["image"] == f"trimtab:{PROJECT['version']}"

    @pytest.mark.parametrize("service", SERVICES)
    def test_what_a_service_mounts_is_a_file_here_or_a_volume_of_the_project(self, service):
        for mount in SERVICES[service]["volumes"]:
            source = mount.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]

    @pytest.mark.parametrize("service", SERVICES)
    def test_what_a_service_waits_for_can_come_true(self, service):
        for name, wait in SERVICES[service].get("depends_on", {}).items():
            healthy = wait["condition"] == "service_healthy"
            # A service that is always started anew never completes.
            assert ("test" in SERVICES[name]["healthcheck"]) if healthy else ("restart" not in SERVICES[name])

    @pytest.mark.parametrize("service", SERVICES)
    def test_a_published_port_is_reached_from_this_machine_alone(self, service):
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))

    def test_the_world_is_made_by_a_command_that_there_is(self):
        result = CliRunner().invoke(app, [*SERVICES["world"]["command"], "--help"])
        assert result.exit_code == 0, result.output

    def test_the_gateway_finds_its_configuration_where_the_image_looks_for_it(self):
        (default,) = (json.loads(rest) for rest in arguments("CMD"))
        targets = [mount.split(":")[1] for mount in SERVICES["gateway"]["volumes"]]
        assert default[0] == "serve"
        assert default[1] in targets

    def test_the_gateway_is_healthy_when_its_models_answer(self):
        port, path = asked(SERVICES["gateway"]["healthcheck"]["test"][-1])
        assert (port, path) == (PORT, "/ready")
        assert path in OPEN_PATHS

    def test_the_volume_is_the_home_of_the_images_user(self):
        assert f"state:{HOME}" in SERVICES["gateway"]["volumes"]
        assert any(f"--home-dir {HOME} " in rest for rest in arguments("RUN"))
        assert arguments("WORKDIR")[-1] == HOME


@pytest.fixture
def settings(tmp_path):
    """What the gateway reads, with the volume at `tmp_path` and an empty world in it."""
    for name in (*FAMILIES, CONTROL):
        (tmp_path / "world" / name).mkdir(parents=True)
    text = (ROOT / "deploy/world.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(text.replace(HOME, str(tmp_path)), encoding="utf-8")
    return load_settings(tmp_path / "config.yaml")


class TestConfiguration:
    def test_all_of_the_worlds_models_are_served_with_its_control(self, settings, tmp_path):
        served = {name: Path(model.model) for name, model in settings.models.items()}
        assert served == {name: tmp_path / "world" / name for name in FAMILIES}
        assert settings.controls == {CONTROL_NAME: str(tmp_path / "world" / CONTROL)}

    def test_the_gateway_listens_where_compose_publishes(self, settings):
        (published,) = SERVICES["gateway"]["ports"]
        assert settings.host == "0.0.0.0"  # noqa: S104 - the container's own network
        assert settings.port == PORT == int(published.rpartition(":")[2])


class TestPrometheus:
    def test_it_scrapes_the_gateway_and_nothing_else(self):
        path = ROOT / "deploy/prometheus/prometheus.yml"
        (job,) = yaml.safe_load(path.read_text(encoding="utf-8"))["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"gateway:{PORT}"]}]
        assert job.get("metrics_path", "/metrics") in OPEN_PATHS

    def test_its_image_is_pinned(self):
        assert re.fullmatch(r"prom/prometheus:v\d+\.\d+\.\d+", SERVICES["prometheus"]["image"])

    def test_its_configuration_stands_where_the_image_reads_it(self):
        mounts = [mount.split(":")[:2] for mount in SERVICES["prometheus"]["volumes"]]
        assert ["./deploy/prometheus/prometheus.yml", "/etc/prometheus/prometheus.yml"] in mounts
