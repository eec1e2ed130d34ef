"""/metrics of the Router: what the job store knows, so that every Router replica says the same.

What happens inside replicas (GPU memory, seconds of a call) is counted there by ray.serve.metrics and scraped from Ray.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from serve_app.jobs import JobStore
from serve_app.models import MODELS


class Jobs(Collector):
    def __init__(self, store: JobStore) -> None:
        self.store = store

    def collect(self) -> Iterator[Any]:
        figures = self.store.figures()
        active = GaugeMetricFamily("viewmesh_jobs_active", "Jobs queued and running.", labels=["state", "model"])
        counts = {(state, model): 0 for state in ("queued", "running") for model in MODELS}
        counts |= {(state, model): count for state, model, count in figures["active"]}
        for labels, count in counts.items():
            active.add_metric(labels, count)
        yield active
        age = 0.0 if figures["oldest"] is None else max(0.0, time.time() - figures["oldest"])
        yield GaugeMetricFamily("viewmesh_oldest_queued_job_seconds", "Age of the oldest queued job.", value=age)
        lease = figures["lease"]
        if lease is not None:
            yield GaugeMetricFamily(
                "viewmesh_conductor_epoch", "How often a Conductor has taken the jobs over.", value=lease.epoch
            )
            yield GaugeMetricFamily(
                "viewmesh_conductor_lease_seconds",
                "For how long the Conductor that runs the jobs may do so; below 0: none does.",
                value=round(lease.left_s, 3),
            )
        sums: dict[str, dict[str, float]] = defaultdict(dict)
        for name, label, value in figures["tallies"]:
            sums[name][label] = value
        ended = CounterMetricFamily(
            "viewmesh_jobs", "Jobs that have ended.", labels=["kind", "model", "outcome", "code"]
        )
        by_model: dict[str, float] = defaultdict(float)
        for label, value in sums["jobs"].items():
            kind, model, outcome, code = label.split("|")
            ended.add_metric([kind, model, outcome, code], value)
            by_model[f"{kind}|{model}"] += value
        yield ended
        seconds = SummaryMetricFamily(
            "viewmesh_job_duration_seconds", "From accepted to over.", labels=["kind", "model"]
        )
        for label, value in sums["job_seconds"].items():
            seconds.add_metric(label.split("|"), count_value=int(by_model[label]), sum_value=value)
        yield seconds
        stages = SummaryMetricFamily(
            "viewmesh_stage_duration_seconds", "Seconds in a stage, per job.", labels=["stage"]
        )
        for stage, value in sums["stage_seconds"].items():
            stages.add_metric([stage], count_value=int(sums["stage_count"].get(stage, 0)), sum_value=value)
        yield stages
        resumes = CounterMetricFamily("viewmesh_job_resumes", "Slices that began with the loading of a checkpoint.")
        resumes.add_metric([], sums["resumes"].get("", 0.0))
        yield resumes


def exposition(store: JobStore, accept: str) -> tuple[bytes, str]:
    """The body and its content type, in the form that the scraper asks for."""
    registry = CollectorRegistry()
    registry.register(Jobs(store))
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type
