"""Metrics in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from shadowllm.runtime.serving.counters import Histogram
from shadowllm.runtime.serving.engine import Engine


class EngineCollector:
    """Reads the counters of an engine when metrics are asked for."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self._engine, self._slots = engine, slots

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of the engine."""
        counters = self._engine.counters
        yield CounterMetricFamily("shadowllm_prompt_tokens", "Prompt tokens computed", counters.prompt_tokens)
        yield CounterMetricFamily("shadowllm_new_tokens", "Tokens generated", counters.new_tokens)
        yield CounterMetricFamily("shadowllm_decode_steps", "Decode steps", counters.steps)
        told = "Bytes that decode steps must read, as if each text were computed alone"
        yield CounterMetricFamily("shadowllm_read_bytes", told, counters.read_bytes)
        drafted, accepted = "Drafted tokens of lossless texts", "Drafted tokens that the dense model accepted"
        yield CounterMetricFamily("shadowllm_drafted_tokens", drafted, counters.drafted)
        yield CounterMetricFamily("shadowllm_accepted_tokens", accepted, counters.accepted)
        rate = "Tokens generated per second, in the last second or two"
        yield GaugeMetricFamily("shadowllm_tokens_per_second", rate, counters.tokens_per_second)
        yield GaugeMetricFamily("shadowllm_queue_length", "Texts that wait for a slot", self._engine.waiting)
        yield GaugeMetricFamily("shadowllm_slots_taken", "Texts that have a slot", self._engine.running)
        yield GaugeMetricFamily("shadowllm_slots", "Slots", self._slots)
        ended = CounterMetricFamily("shadowllm_texts", "Ended texts by outcome", labels=["outcome"])
        for outcome, count in counters.outcomes.items():
            ended.add_metric([outcome], count)
        yield ended
        share = GaugeMetricFamily(
            "shadowllm_full_precision_share", "Mean share of the units computed in full", labels=["unit"]
        )
        for unit, total in counters.share_sums.items():
            share.add_metric([unit], total / counters.share_steps if counters.share_steps else 1.0)
        yield share
        yield _histogram("shadowllm_time_to_first_token_seconds", "Seconds to the first token", counters.first_token)
        yield _histogram("shadowllm_inter_token_seconds", "Seconds between two tokens", counters.inter_token)


def make_registry(engine: Engine, slots: int) -> tuple[CollectorRegistry, Counter]:
    """Return a registry with the metrics of an engine, and a counter of HTTP requests by path and status in it."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, slots))
    requests = Counter(
        "shadowllm_http_requests", "HTTP requests by path and status", ["path", "status"], registry=registry
    )
    return registry, requests


def _histogram(name: str, text: str, values: Histogram) -> HistogramMetricFamily:
    counts, buckets, total = list(values.counts), [], 0
    for bound, count in zip((*map(str, values.bounds), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(name, text, buckets, values.total)
