"""Numbers for Prometheus: requests by the server, rows and tokens by the engine."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foreword.serve.engine import Engine
from foreword.serve.tiers.usage import Usage

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        self.requests = Counter(
            "foreword_requests", "Requests by route, task and status.", ["route", "model", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "foreword_request_seconds", "From a request's first byte to its answer's last.", ["route"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "foreword_first_token_seconds", "From a request to its first token.", ["route"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter(
            "foreword_tokens", "Tokens of prompts and of answers.", ["model", "kind"], registry=self.registry
        )

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """Read off the engine when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats
        usage = self.engine.library.usage
        for name, text, value in (
            ("rows", "Answers that are being written.", stats.rows),
            ("reading_rows", "Answers whose prompts are being read.", stats.reading),
            ("waiting_requests", "Requests in the queue.", stats.waiting),
            ("lanes", "Batches that go through the model in a step.", stats.lanes),
            ("padding_columns", "Tokens in the batches that are no row's own.", stats.padding),
            ("kv_bytes", "Bytes allocated for the keys and values of texts.", stats.kv_bytes),
            ("tasks", "Tasks that are served.", len(usage.tasks)),
            (
                "prefix_bytes",
                "Bytes of their prefixes, wherever they are.",
                sum(t.nbytes for t in usage.tasks.values()),
            ),
            ("promised_bytes", "Bytes of the device kept for running requests.", usage.caches),
        ):
            yield GaugeMetricFamily(f"foreword_{name}", text, value=float(value))
        for name, text, value in (
            ("engine_requests", "Requests that the engine took.", stats.requests),
            ("engine_failed", "Requests that failed in the engine.", stats.failed),
            ("engine_cancelled", "Requests that were cancelled.", stats.cancelled),
            ("steps", "Steps of the engine.", stats.steps),
            ("read_tokens", "Prompt tokens that went through the model.", stats.prompt_tokens),
            ("written_tokens", "Tokens that the model wrote.", stats.written_tokens),
            ("evictions", "Tasks that were taken off the device.", usage.counts.evictions),
            ("moves_down", "Tasks moved to CPU memory or to a file.", usage.counts.moves_down),
            ("moves_up", "Tasks brought to the device.", usage.counts.moves_up),
            ("compressions", "Tasks written in few bits.", usage.counts.compressions),
            ("shortenings", "Tasks that lost tokens.", usage.counts.shortenings),
            ("budget_refusals", "What found no room.", usage.counts.refusals),
        ):
            yield CounterMetricFamily(f"foreword_{name}", text, value=float(value))
        yield from _of_tiers(usage)


def _of_tiers(usage: Usage) -> Iterable[Metric]:
    held = GaugeMetricFamily("foreword_tier_bytes", "Bytes used in a tier, promised ones included.", labels=["tier"])
    tasks = GaugeMetricFamily("foreword_tier_tasks", "Tasks whose numbers are in a tier.", labels=["tier"])
    limits = GaugeMetricFamily("foreword_tier_limit_bytes", "The budget, where there is one.", labels=["tier"])
    for tier, use in usage.tiers.items():
        held.add_metric([tier], use.nbytes)
        tasks.add_metric([tier], use.tasks)
        if use.limit is not None:
            limits.add_metric([tier], use.limit)
    return held, tasks, limits
