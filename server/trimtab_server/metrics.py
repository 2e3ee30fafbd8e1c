"""The gateway's metrics, and those of all replicas, as one exposition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

MODEL_LABEL = "model_name"
REPLICA_LABEL = "replica"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What the gateway counts. Label values are bounded: configured names, known endpoints, HTTP statuses."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_request = (MODEL_LABEL, "endpoint", "control")
        by_replica = (MODEL_LABEL, REPLICA_LABEL)
        self.requests = Counter(
            "trimtab_gateway_requests",
            "Requests answered. Status 499: the client went away first.",
            (*by_request, "status"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "trimtab_gateway_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            by_request,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "trimtab_gateway_time_to_first_byte_seconds",
            "Time from a request's arrival to the first byte of its answer's body.",
            by_request,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "trimtab_gateway_requests_in_flight",
            "Requests under way, by the model they are for; those that wait for their turn among them.",
            (MODEL_LABEL,),
            registry=self.registry,
        )
        self.queued = Gauge(
            "trimtab_gateway_requests_queued",
            "Requests that wait for their turn at the model.",
            (MODEL_LABEL,),
            registry=self.registry,
        )
        self.worker_up = Gauge(
            "trimtab_gateway_worker_up",
            "Whether the replica gave its metrics to this scrape.",
            by_replica,
            registry=self.registry,
        )
        self.replica_in_flight = Gauge(
            "trimtab_gateway_worker_requests",
            "Requests that the replica has and has not ended.",
            by_replica,
            registry=self.registry,
        )
        self.restarts = Counter(
            "trimtab_gateway_worker_restarts",
            "Restarts of a replica, by what went before: it had ended, had not become ready, or hung.",
            (*by_replica, "cause"),
            registry=self.registry,
        )

    def expose(self, scrapes: Mapping[str, Sequence[str | None]]) -> bytes:
        """The gateway's metrics and the replicas', in Prometheus' text format.

        A replica's samples are labelled with its model, and with its replica where the model has several.

        Args:
            scrapes: the expositions of each model's replicas, None where one gave none.
        """
        parsed = {model: [_parse(text) for text in texts] for model, texts in scrapes.items()}
        for model, replicas in parsed.items():
            for i, families in enumerate(replicas):
                self.worker_up.labels(model, str(i)).set(families is not None)
        merged = {metric.name: metric for metric in self.registry.collect()}
        for model, replicas in parsed.items():
            for i, families in enumerate(replicas):
                own = {REPLICA_LABEL: str(i)} if len(replicas) > 1 else {}
                _merge(merged, model, own, families or ())
        registry = CollectorRegistry()
        registry.register(_Families(merged.values()))
        return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _parse(text: str | None) -> list[Metric] | None:
    try:
        return None if text is None else list(text_string_to_metric_families(text))
    except ValueError:
        return None


def _merge(merged: dict[str, Metric], model: str, own: Mapping[str, str], families: Iterable[Metric]) -> None:
    """Add a replica's families; one that has another type elsewhere is left out: a scrape can't hold both."""
    for family in families:
        whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        if whole.type == family.type:
            whole.samples.extend(_labelled(sample, model, own) for sample in family.samples)


def _labelled(sample: Sample, model: str, own: Mapping[str, str]) -> Sample:
    """What the sample says of its model holds; `own` tells replicas apart, whatever they say."""
    return sample._replace(labels={MODEL_LABEL: model, **sample.labels, **own})
