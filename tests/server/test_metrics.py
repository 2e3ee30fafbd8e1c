"""Expositions of several replicas become one."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trimtab_server.metrics import Metrics

COUNTER = '# HELP jobs_total Jobs.\n# TYPE jobs_total counter\njobs_total{{model_name="{}"}} {}\n'


def families_of(exposition: bytes):
    return {f.name: f for f in text_string_to_metric_families(exposition.decode())}


def test_a_family_stands_once_with_the_samples_of_all():
    text = Metrics().expose({"a": [COUNTER.format("a", 1)], "b": [COUNTER.format("b", 2)]})
    assert text.count(b"# TYPE jobs_total counter") == 1
    assert [s.value for s in families_of(text)["jobs"].samples] == [1, 2]


def test_a_sample_that_does_not_say_its_model_is_given_it():
    text = Metrics().expose({"a": ["up 1\n"], "b": ['up{model_name="own"} 2\n']})
    assert [s.labels for s in families_of(text)["up"].samples] == [{"model_name": "a"}, {"model_name": "own"}]


def test_a_family_of_another_type_is_left_out_and_the_rest_is_not():
    other = "# TYPE jobs gauge\njobs 5\n# TYPE more gauge\nmore 1\n"
    families = families_of(Metrics().expose({"a": [COUNTER.format("a", 1)], "b": [other]}))
    assert families["jobs"].type == "counter"
    assert [s.value for s in families["jobs"].samples] == [1]
    assert families["more"].samples[0].labels == {"model_name": "b"}


@pytest.mark.parametrize("broken", [None, "not { an exposition", "x one\n"])
def test_a_worker_without_a_valid_exposition_is_down_and_spoils_nothing(broken):
    families = families_of(Metrics().expose({"a": [broken], "b": [COUNTER.format("b", 2)]}))
    up = {s.labels["model_name"]: s.value for s in families["trimtab_gateway_worker_up"].samples}
    assert up == {"a": 0, "b": 1}
    assert families["jobs"].samples[0].value == 2


def test_label_values_are_escaped_again():
    text = Metrics().expose({"a": ['x{path="a\\"b\\\\c\\nd"} 1\n']})
    assert families_of(text)["x"].samples[0].labels["path"] == 'a"b\\c\nd'


def test_a_worker_that_uses_the_gateways_names_joins_its_family():
    own = "# TYPE trimtab_gateway_worker_up gauge\ntrimtab_gateway_worker_up 9\n"
    text = Metrics().expose({"a": [own]})
    assert text.count(b"# TYPE trimtab_gateway_worker_up gauge") == 1


def test_the_samples_of_several_replicas_are_kept_apart_whatever_they_say_of_themselves():
    other = '# TYPE jobs_total counter\njobs_total{replica="7"} 2\n'
    families = families_of(Metrics().expose({"a": [COUNTER.format("a", 1), other]}))
    labels = [s.labels for s in families["jobs"].samples]
    assert labels == [{"model_name": "a", "replica": "0"}, {"model_name": "a", "replica": "1"}]
    up = [s.labels["replica"] for s in families["trimtab_gateway_worker_up"].samples]
    assert up == ["0", "1"]
