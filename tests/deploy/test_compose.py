"""What can be said of the containers without an engine that runs them.

The linter, Compose and Prometheus are asked where they are installed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from served import served
from serving import free_port, get_json
from trimtab_server.api.routes import open_routes
from trimtab_server.cli import app
from trimtab_server.config.schema import load_settings
from trimtab_training.world.families import FAMILIES
from trimtab_training.world.world import CONTROL, CONTROL_NAME

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES = COMPOSE["services"]
ON_GPUS = yaml.safe_load((ROOT / "docker-compose.cuda.yml").read_text(encoding="utf-8"))["services"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
HOME = "/var/lib/trimtab"
OURS = [name for name in SERVICES if SERVICES[name]["image"].startswith("trimtab:")]
BUILT = [name for name in OURS if "build" in SERVICES[name]]
THEIRS = [name for name in SERVICES if name not in OURS]
WATCHED = [name for name in SERVICES if "test" in SERVICES[name].get("healthcheck", {})]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, each on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole.splitlines())]


def arguments(instruction: str, stage: str | None = None) -> list[str]:
    """What stands behind `instruction` in every stage, or in one."""
    found = []
    current = ""
    for word, rest in instructions():
        if word == "FROM":
            current = rest.split()[-1]
        if word == instruction and stage in {None, current}:
            found.append(rest)
    return found


def packages(name: str) -> set[str]:
    """The packages of a file of requirements."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0] for line in lines if line and not line.startswith("#")}


def dependencies(name: str) -> list[str]:
    """Those of an installed package; what is not installed was left out, and asks for nothing."""
    with contextlib.suppress(PackageNotFoundError):
        return requires(name) or []
    return []


def needed(*wanted: str) -> set[str]:
    """The packages that `wanted`, such as `trimtab[cpu]`, ask for, themselves among them."""
    found: set[tuple[str, str]] = set()
    waiting = list(map(Requirement, wanted))
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras}:
            if (name, extra) in found:
                continue
            found.add((name, extra))
            others = map(Requirement, dependencies(name))
            waiting += [o for o in others if o.marker is None or o.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def asked(command: str) -> tuple[int, str]:
    """The port and the path that a health check asks."""
    (found,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/-]+)", command)
    return int(found[0]), found[1]


def check_of(service: str) -> list[str]:
    kind, *command = SERVICES[service]["healthcheck"]["test"]
    assert kind == "CMD"
    return command


def mounts(service: str) -> dict[str, str]:
    """What stands where in a service's file system: a directory or file here, or a volume."""
    return {target: source for source, target, *_ in (m.split(":") for m in SERVICES[service]["volumes"])}


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)


def compose_command() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        # Version 1 does not know all of today's format.
        if shutil.which(command[0]) and re.search(r"version v?[2-9]", ran(*command, "version").stdout):
            return command
    pytest.skip("Compose is not installed")


PORT = int(arguments("EXPOSE")[0])
OPEN_PATHS = {route.path for route in open_routes.routes}
IMAGES = ["cpu", "cuda"]


class TestDockerfile:
    def test_the_linter_has_nothing_against_it(self):
        if shutil.which("hadolint") is None:
            pytest.skip("hadolint is not installed")
        result = ran("hadolint", "Dockerfile")
        assert result.returncode == 0, result.stdout

    def test_every_path_that_it_copies_exists(self):
        sources = [s for rest in arguments("COPY") if "--from" not in rest for s in rest.split()[:-1]]
        assert sources
        assert [source for source in sources if not (ROOT / source).exists()] == []

    def test_the_cpu_is_what_it_builds_where_nothing_else_is_said(self):
        stages = [rest.split()[-1] for rest in arguments("FROM")]
        assert stages[-1] == "cpu"
        assert "cuda" in stages

    @pytest.mark.parametrize("image", IMAGES)
    def test_a_lock_file_is_installed_as_it_stands_by_the_makefiles_uv(self, image):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        (step,) = arguments("RUN", f"{image}-packages")
        assert "--no-deps" in step
        assert f"-r {image}.txt" in step
        (copied,) = arguments("COPY", f"{image}-packages")
        assert f"requirements/{image}.txt" in copied.split()
        assert re.findall(r"uv==[\d.]+", arguments("RUN", "tools")[0]) == re.findall(r"uv==[\d.]+", makefile)

    @pytest.mark.parametrize("image", IMAGES)
    def test_an_image_has_its_own_packages_and_runs_as_nobody_special(self, image):
        (copied,) = arguments("COPY", image)
        assert copied == f"--from={image}-packages /venv /venv"
        (user,) = arguments("USER", image)
        assert user.split(":")[0].isdecimal()
        assert user.split(":")[0] != "0"

    def test_the_image_for_cpus_leaves_out_what_serving_does_without(self):
        unused = packages("cpu.txt") - needed("trimtab[cpu]")
        assert packages("image-excludes.txt") == unused | {"triton"}

    def test_the_build_sees_the_packages_the_locks_and_nothing_else(self):
        first, *rest = [
            line
            for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
        ]
        wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
        tops = {package.split("/")[0] for package in wheel["packages"]}
        files = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
        assert first == "*"
        assert {line[1:] for line in rest if line.startswith("!")} == {*tops, *files, "requirements"}

    def test_it_runs_the_projects_command(self):
        (entry,) = (json.loads(rest) for rest in arguments("ENTRYPOINT"))
        assert entry[0] in PROJECT["scripts"]

    def test_its_labels_are_the_projects(self):
        labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', arguments("LABEL")[0]))
        assert labels["version"] == PROJECT["version"]
        assert labels["licenses"] == PROJECT["license"]

    def test_its_health_check_asks_a_path_that_needs_no_key(self):
        port, path = asked(arguments("HEALTHCHECK")[0])
        assert (port, path) == (PORT, "/health")
        assert path in OPEN_PATHS


class TestCompose:
    @pytest.mark.parametrize(
        "files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.cuda.yml"]]
    )
    def test_compose_understands_it(self, files):
        command = [
            *compose_command(),
            *(part for file in files for part in ("-f", file)),
            "config",
            "--quiet",
        ]
        result = ran(*command)
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize("service", OURS)
    def test_our_images_are_named_after_the_version(self, service):
        assert SERVICES[service]["image"] == f"trimtab:{PROJECT['version']}"
        assert ON_GPUS[service]["image"] == f"trimtab:{PROJECT['version']}-cuda"

    @pytest.mark.parametrize("service", BUILT)
    def test_our_images_are_targets_of_the_dockerfile(self, service):
        stages = [rest.split()[-1] for rest in arguments("FROM")]
        assert SERVICES[service]["build"]["target"] in stages
        assert ON_GPUS[service]["build"]["target"] in stages

    @pytest.mark.parametrize("service", THEIRS)
    def test_the_images_of_others_are_pinned(self, service):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", SERVICES[service]["image"])

    @pytest.mark.parametrize("service", SERVICES)
    def test_what_a_service_mounts_is_here_or_a_volume_of_the_project(self, service):
        for source in mounts(service).values():
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]

    def test_every_service_is_watched_but_the_one_that_ends(self):
        assert set(SERVICES) - set(WATCHED) == {"world"}

    @pytest.mark.parametrize("service", SERVICES)
    def test_what_a_service_waits_for_can_come_true(self, service):
        for name, wait in SERVICES[service].get("depends_on", {}).items():
            match wait["condition"]:
                case "service_healthy":
                    assert name in WATCHED
                case "service_completed_successfully":  # which one that is started anew never is
                    assert "restart" not in SERVICES[name]
                case condition:
                    assert condition == "service_started"

    @pytest.mark.parametrize("service", WATCHED)
    def test_the_port_that_is_asked_is_published_to_this_machine_alone(self, service):
        (published,) = SERVICES[service]["ports"]
        assert published.startswith("127.0.0.1:")
        assert asked(check_of(service)[-1])[0] == int(published.rpartition(":")[2])

    def test_every_variable_is_explained_and_none_else(self):
        read = {*re.findall(r"\$\{(\w+)", COMPOSE_TEXT), *SERVICES["gateway"]["build"]["args"]}
        text = (ROOT / "docs/containers.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (`[A-Z].*?) \|", text, flags=re.MULTILINE)
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == read

    def test_the_world_is_made_by_a_command_that_there_is(self):
        result = CliRunner().invoke(app, [*SERVICES["world"]["command"], "--help"])
        assert result.exit_code == 0, result.output

    def test_the_gateway_finds_its_configuration_where_the_image_looks_for_it(self):
        (default,) = (json.loads(rest) for rest in arguments("CMD"))
        assert default[0] == "serve"
        assert default[1] in mounts("gateway")

    def test_the_volume_is_the_home_of_the_images_user(self):
        assert mounts("gateway")[HOME] == "state"
        assert any(f"--home-dir {HOME} " in rest for rest in arguments("RUN", "runtime"))
        assert arguments("WORKDIR", "runtime") == [HOME]


class TestHealthChecks:
    """The commands themselves, with this Python and at the ports that were free here."""

    @staticmethod
    def is_well(command: list[str], port: int) -> bool:
        program, *rest = (re.sub(r"(127\.0\.0\.1):\d+", rf"\1:{port}", part) for part in command)
        program = sys.executable if program == "python" else program
        return ran(program, *rest).returncode == 0

    def test_a_gateway_lives_as_long_as_it_runs_and_is_ready_when_its_models_are(self, tmp_path):
        lives = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])
        ready = check_of("gateway")
        assert asked(ready[-1]) == (PORT, "/ready")
        nobody = {"url": f"http://127.0.0.1:{free_port()}"}
        with served(tmp_path, models={"m": {}, "n": {"replicas": [nobody]}}) as gateway:
            gateway.wait_for(lambda: self.is_well(lives, gateway.port), seconds=60)
            assert not self.is_well(ready, gateway.port)
        with served(tmp_path) as gateway:
            gateway.wait_until_ready()
            assert self.is_well(ready, gateway.port)
            gateway.stop()
            assert not self.is_well(ready, gateway.port)
            assert not self.is_well(lives, gateway.port)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Reads the configuration with services' variables, and an empty world in the volume, at `tmp_path`."""
    for name in (*FAMILIES, CONTROL):
        (tmp_path / "world" / name).mkdir(parents=True)
    text = (DEPLOY / "world.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(text.replace(HOME, str(tmp_path)), encoding="utf-8")

    def read(*services: dict):
        for service in services:
            for name, value in service["environment"].items():
                monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
        return load_settings(tmp_path / "config.yaml")

    return read


class TestConfiguration:
    def test_all_of_the_worlds_models_are_served_with_its_control(self, settings, tmp_path):
        read = settings(SERVICES["gateway"])
        served_models = {name: Path(model.model) for name, model in read.models.items()}
        assert served_models == {name: tmp_path / "world" / name for name in FAMILIES}
        assert read.controls == {CONTROL_NAME: str(tmp_path / "world" / CONTROL)}
        assert read.api_keys == frozenset()

    def test_the_gateway_listens_where_compose_publishes(self, settings):
        read = settings(SERVICES["gateway"])
        (published,) = SERVICES["gateway"]["ports"]
        assert read.host == "0.0.0.0"  # noqa: S104 - the container's own network
        assert read.port == PORT == int(published.rpartition(":")[2])

    def test_compose_waits_longer_than_the_gateway_takes_to_end(self, settings):
        read = settings(SERVICES["gateway"])
        assert SERVICES["gateway"]["stop_grace_period"] == "1m"
        assert read.timeouts.drain + read.timeouts.stop < 60

    def test_the_models_share_a_gpu(self, settings):
        read = settings(SERVICES["gateway"], ON_GPUS["gateway"])
        shares = [model.args["gpu-memory-utilization"] for model in read.models.values()]
        assert len(shares) == len(FAMILIES)
        assert sum(shares) < 0.9


class TestPrometheus:
    CONFIG = DEPLOY / "prometheus/prometheus.yml"

    def test_it_scrapes_the_gateway_and_nothing_else(self):
        (job,) = yaml.safe_load(self.CONFIG.read_text(encoding="utf-8"))["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"gateway:{PORT}"]}]
        assert job.get("metrics_path", "/metrics") in OPEN_PATHS

    def test_its_configuration_stands_where_the_image_reads_it(self):
        assert mounts("prometheus")["/etc/prometheus"] == "./deploy/prometheus"
        assert (DEPLOY / "prometheus/prometheus.yml").is_file()

    def test_it_is_well_with_its_configuration_and_reaches_a_gateway(self, tmp_path):
        if shutil.which("prometheus") is None or shutil.which("wget") is None:
            pytest.skip("Prometheus or wget is not installed")
        port = free_port()
        directory = shutil.copytree(self.CONFIG.parent, tmp_path / "prometheus")
        with served(tmp_path) as gateway, (tmp_path / "prometheus.log").open("w") as log:
            text = self.CONFIG.read_text(encoding="utf-8").replace(
                f"gateway:{PORT}", f"127.0.0.1:{gateway.port}"
            )
            text = re.sub(r"scrape_interval: \w+", "scrape_interval: 1s", text)
            (directory / "prometheus.yml").write_text(text, encoding="utf-8")
            gateway.wait_until_ready()
            watcher = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
            try:
                gateway.wait_for(lambda: TestHealthChecks.is_well(check_of("prometheus"), port))
                gateway.wait_for(lambda: up(port) == ["1"])
            finally:
                watcher.terminate()
                watcher.wait(20)


def up(port: int) -> list[str]:
    """Whether Prometheus reached its targets at the last time."""
    result = get_json(f"http://127.0.0.1:{port}/api/v1/query?query=up")["data"]["result"]
    return [series["value"][1] for series in result]


class TestGrafana:
    PROVISIONING = DEPLOY / "grafana/provisioning"

    def provisioned(self, kind: str) -> list[dict]:
        files = sorted((self.PROVISIONING / kind).glob("*.y*ml"))
        key = {"datasources": "datasources", "dashboards": "providers"}[kind]
        return [one for file in files for one in yaml.safe_load(file.read_text(encoding="utf-8"))[key]]

    def test_it_is_provisioned_from_the_repository(self):
        assert mounts("grafana")["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"

    def test_it_asks_the_prometheus_of_compose(self):
        (source,) = self.provisioned("datasources")
        url = urlsplit(source["url"])
        assert url.hostname in SERVICES
        assert f":{url.port}" in SERVICES[url.hostname]["ports"][0][-5:]

    def test_dashboards_stand_where_it_looks_for_them(self):
        (provider,) = self.provisioned("dashboards")
        assert list((ROOT / mounts("grafana")[provider["options"]["path"]]).glob("*.json"))

    def test_who_changes_something_needs_the_password_of_the_environment(self):
        environment = SERVICES["grafana"]["environment"]
        assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
        assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD")
