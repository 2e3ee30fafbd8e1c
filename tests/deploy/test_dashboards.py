"""What Prometheus and Grafana are given to watch a gateway with, held against a real one under load."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import yaml

from prometheus import Prometheus, prometheus
from served import FAKE
from serving import ENGINE, engine_environment, gateway
from trimtab_processors import metrics
from trimtab_server.metrics import Metrics

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy/grafana"
CONFIG, RULES = (ROOT / "deploy/prometheus" / name for name in ("prometheus.yml", "alerts.yml"))
UNIT_TESTS = Path(__file__).with_name("alerts.test.yml")
DASHBOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
PANEL_TYPES = {"timeseries", "stat", "gauge", "heatmap", "table"}
ABSENT = "absent("
PROMETHEUS_OWN = {"up", "ALERTS"}


def panels(dashboard: dict) -> list[dict]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def variables(dashboard: dict) -> dict[str, dict]:
    """Those that are asked of Prometheus."""
    return {v["name"]: v for v in dashboard["templating"]["list"] if v["type"] == "query"}


@dataclass(frozen=True)
class Query:
    """One that a panel makes."""

    dashboard: str
    panel: str
    expression: str

    def __str__(self) -> str:
        return f"{self.dashboard}, {self.panel}"


PANELS = [pytest.param(p, id=f"{name}, {p['title']}") for name, d in DASHBOARDS.items() for p in panels(d)]
QUERIES = [
    Query(name, panel["title"], target["expr"])
    for name, dashboard in DASHBOARDS.items()
    for panel in panels(dashboard)
    for target in panel["targets"]
]
VARIABLES = [
    pytest.param(name, variable, id=f"{name}, {variable}")
    for name, dashboard in DASHBOARDS.items()
    for variable in variables(dashboard)
]
EXPRESSIONS = [query.expression for query in QUERIES] + [rule["expr"] for rule in ALERTS.values()]


def left_of_its_threshold(expression: str) -> str:
    """What an alert compares, and what it wants the absence of."""
    if expression.startswith(ABSENT):
        return expression.removeprefix(ABSENT).removesuffix(")")
    return re.fullmatch(r"(.+) (?:==|>) [\d.]+\s*", expression, re.DOTALL)[1]


def own_metrics() -> set[str]:
    """The names under which the gateway and the plugin show what they count, as Prometheus stores them."""
    plugin = [metric.describe()[0] for metric in (*metrics.OF_MODELS, *metrics.OF_CONTROLS)]
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    families = [*plugin, *Metrics().registry.collect()]
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def names_in(expression: str) -> set[str]:
    """The metrics that an expression names."""
    return set(re.findall(r"\b(?:trimtab_\w+|vllm:\w+|up|ALERTS)\b", expression))


class TestDashboards:
    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_each_is_found_by_a_name_that_stays(self, name):
        dashboard = DASHBOARDS[name]
        assert dashboard["uid"] == f"trimtab-{name}"
        assert dashboard["title"].startswith("Trimtab: ")
        assert "id" not in dashboard  # Grafana's own number

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_each_is_written_for_people_to_read(self, name):
        text = (GRAFANA / "dashboards" / f"{name}.json").read_text(encoding="utf-8")
        assert text == json.dumps(DASHBOARDS[name], indent=2, ensure_ascii=False) + "\n"

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_no_panel_lies_over_another(self, name):
        taken = [
            (column, line)
            for panel in DASHBOARDS[name]["panels"]
            for place in [panel["gridPos"]]
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        ]
        assert len(taken) == len(set(taken))
        assert max(column for column, _ in taken) < 24
        ids = [panel["id"] for panel in DASHBOARDS[name]["panels"]]
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize("panel", PANELS)
    def test_each_panel_says_what_it_shows_and_in_what_unit(self, panel):
        assert panel["type"] in PANEL_TYPES
        assert panel["description"].endswith(".")
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults.get("unit") or panel["options"]["yAxis"]["unit"]

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_each_is_asked_by_model_and_control_of_one_data_source(self, name):
        dashboard = DASHBOARDS[name]
        source, *asked = dashboard["templating"]["list"]
        provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
        assert source["current"]["value"] in [one["uid"] for one in provisioned["datasources"]]
        assert [variable["name"] for variable in asked] == ["model_name", "control"]
        assert all(v["multi"] and v["includeAll"] and v["allValue"] == ".*" for v in asked)
        uids = {one["datasource"]["uid"] for one in (*panels(dashboard), *asked)}
        assert uids == {"${" + source["name"] + "}"}

    def test_the_data_source_is_scraped_as_often_as_grafana_believes(self):
        provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
        (source,) = provisioned["datasources"]
        assert (
            source["jsonData"]["timeInterval"]
            == yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"]
        )


def test_no_metric_is_asked_for_that_nobody_has():
    named = set().union(*map(names_in, EXPRESSIONS))
    assert {name for name in named - PROMETHEUS_OWN if not name.startswith("vllm:")} <= own_metrics()


def test_everything_that_we_count_is_on_a_dashboard():
    named = set().union(*(names_in(query.expression) for query in QUERIES))
    assert {name for name in own_metrics() if not re.search("_(sum|count)$", name)} <= named


class TestAlerts:
    @pytest.mark.parametrize("name", ALERTS)
    def test_each_says_how_bad_it_is_and_what_is_the_matter(self, name):
        assert ALERTS[name]["labels"]["severity"] in {"warning", "critical"}
        assert set(ALERTS[name]["annotations"]) == {"summary", "description"}

    @pytest.mark.parametrize("name", ALERTS)
    def test_each_is_shown_to_fire_and_not_to_fire(self, name):
        cases = yaml.safe_load(UNIT_TESTS.read_text(encoding="utf-8"))["tests"]
        expected = [
            bool(case["exp_alerts"])
            for test in cases
            for case in test["alert_rule_test"]
            if case["alertname"] == name
        ]
        assert set(expected) == {True, False}

    @pytest.mark.parametrize("name", ALERTS)
    def test_each_has_its_place_in_the_runbook(self, name):
        assert f"### {name}\n" in (ROOT / "docs/dashboards.md").read_text(encoding="utf-8")

    def test_the_rules_and_their_unit_tests_pass(self, promtool):
        promtool("check", "config", CONFIG)
        promtool("check", "rules", RULES)
        promtool("test", "rules", UNIT_TESTS)


@pytest.fixture(scope="module")
def promtool():
    """Run Prometheus' own tool; it must find nothing wrong."""
    require("promtool")

    def run(*arguments: object, text: str | None = None) -> None:
        command = ["promtool", *map(str, arguments)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def require(command: str) -> None:
    """Skip what needs a command that is not installed; where everything has to be there, fail."""
    if shutil.which(command) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{command} is not installed")


@dataclass(frozen=True)
class Watched:
    """A Prometheus, and when what it watched was under load."""

    server: Prometheus
    exposition: str
    begin: float
    end: float

    def ask(self, query: Query, **chosen: str) -> list[float]:
        """The numbers that a panel would have been given in that time."""
        values = self.server.between(self.begin, self.end, substitute(query.expression, **chosen))
        return [value for value in values if math.isfinite(value)]

    def options(self, dashboard: str, variable: str, **chosen: str) -> list[str]:
        """What a variable lets choose."""
        query = variables(DASHBOARDS[dashboard])[variable]["query"]["query"]
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
        return self.server.label_values(substitute(selector, **chosen), label)


def substitute(expression: str, **chosen: str) -> str:
    """Fill in variables as Grafana does; windows as they fit a minute of scrapes."""
    filled = {"__rate_interval": "15s", "__range": "2m", **chosen}
    return re.sub(r"\$(\w+)", lambda found: filled[found[1]], expression)


@pytest.fixture(scope="module")
def watched(family, tmp_path_factory) -> Iterator[Watched]:
    """A real engine, and a worker that dawdles and dies when it is told to, asked for all that is counted."""
    require("prometheus")
    directory = tmp_path_factory.mktemp("watched")
    config = {
        "controls": {"first": str(family.control), "second": str(family.control)},
        "tables": str(directory / "tables"),
        "models": {
            "b": {
                "model": str(family.b),
                "args": ENGINE | {"max-num-seqs": 2},
                "env": engine_environment(0),
                "plugin": {"kl_every": 2},
            },
            "fake": {"model": "org/name", "command": FAKE},
        },
        "limits": {"concurrent": 8, "queued": 2},
        "restarts": {"backoff": 0.1, "longest": 0.2},
    }
    with gateway(directory, config) as url, prometheus(directory, scraping(url, directory)) as server:
        wait_for(server, 'up{job="trimtab"} == 1')
        begin = time.time()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            for restarts in (1, 2, 3):
                use(client)
                restarted = f"sum without (cause) (trimtab_gateway_worker_restarts_total) == {restarts}"
                wait_for(server, f"{restarted} and trimtab_gateway_worker_up == 1")
        wait_for(server, 'ALERTS{alertname="TrimtabWorkerRestarting", alertstate="firing"}')
        time.sleep(1)  # as far as a range's steps are apart
        end = time.time()
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            exposition = response.read().decode()
        yield Watched(server, exposition, begin, end)


def scraping(url: str, directory: Path) -> dict:
    """The configuration as it is delivered, with another gateway, and more often."""
    shutil.copy(RULES, directory)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    return config


def wait_for(server: Prometheus, query: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not server.at(time.time(), query):
        assert time.monotonic() < deadline, query
        time.sleep(0.3)


def ask(client: openai.OpenAI, model: str, control: object = None, **options) -> None:
    """Whatever the answer is, it is read to its end."""
    extra = {"control": control, "ignore_eos": True, **options.pop("extra", {})}
    messages = [{"role": "user", "content": "Tell me a story."}]
    options = {"max_tokens": 40, "temperature": 1, "extra_body": extra, **options}
    with contextlib.suppress(openai.APIStatusError, openai.APIConnectionError):
        answer = client.chat.completions.create(model=model, messages=messages, **options)
        if options.get("stream"):
            list(answer)


def use(client: openai.OpenAI) -> None:
    """Ask for all that is counted: answers and streams under every control, errors, a line and a death."""
    with ThreadPoolExecutor(12) as clients:
        clients.submit(ask, client, "b", "first", max_tokens=200)  # past the control's window
        for control in (None, "first", "second", ["first", "second"]):
            for stream in (False, True):
                clients.submit(ask, client, "b", control, stream=stream)
        clients.submit(ask, client, "b", "first", temperature=-1)
        clients.submit(ask, client, "nobody")
    with ThreadPoolExecutor(12) as clients:
        for _ in range(12):
            clients.submit(ask, client, "fake", extra={"fake": {"delay": 2.5}})
    ask(client, "fake", extra={"fake": {"die": "before"}})


DID_NOT_HAPPEN = {"Non-finite shifts", "Unknown control", "Preemptions"}
OF_THE_MOMENT = {"In the engines", "Control cache", "KV cache of the engines"}
"""What an engine has in hand: no scrape need fall into the second for which this one is busy."""


@pytest.mark.engine
class TestARealGateway:
    @pytest.mark.parametrize("query", QUERIES, ids=str)
    def test_every_panel_shows_what_happened(self, watched, query):
        values = watched.ask(query, model_name=".*", control=".*")
        assert values
        assert max(values) > 0 or query.panel in DID_NOT_HAPPEN | OF_THE_MOMENT

    @pytest.mark.parametrize(("dashboard", "variable"), VARIABLES)
    def test_every_variable_offers_what_there_is(self, watched, dashboard, variable):
        everything = {"model_name": {"b"}, "control": {"first", "second"}}
        assert everything[variable] <= set(watched.options(dashboard, variable, model_name=".*"))

    @pytest.mark.parametrize("query", QUERIES, ids=str)
    def test_every_panel_shows_what_several_chosen_models_and_controls_did(self, watched, query):
        assert watched.ask(query, model_name="(b|fake)", control="(first|second)")

    def test_every_alert_is_evaluated_without_an_error(self, watched):
        rules = [rule for group in watched.server.ask("rules")["groups"] for rule in group["rules"]]
        faults = {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"}
        assert faults == {}
        assert {rule["name"] for rule in rules} == set(ALERTS)

    @pytest.mark.parametrize("name", ALERTS)
    def test_every_alert_compares_something_that_there_is(self, watched, name):
        compared = watched.server.at(watched.end, left_of_its_threshold(ALERTS[name]["expr"]))
        assert any(map(math.isfinite, compared))

    def test_a_worker_that_died_three_times_is_an_alert(self, watched):
        assert watched.server.at(
            watched.end, 'ALERTS{alertname="TrimtabWorkerRestarting", model_name="fake"}'
        )

    def test_promtool_finds_nothing_wrong_with_our_metrics(self, watched, promtool):
        """vLLM's have colons in their names, which are for recording rules, so it is not asked about them."""
        own = re.findall(r"^(?:# \w+ )?trimtab_.*\n", watched.exposition, re.MULTILINE)
        assert own
        promtool("check", "metrics", text="".join(own))
