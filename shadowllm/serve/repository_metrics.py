"""The engine's metrics as custom metrics of Triton Inference Server. It can be imported only in that server."""

from __future__ import annotations

import threading
from typing import Any, Self

import triton_python_backend_utils as backend
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from shadowllm.serve.metrics import EngineCollector

PERIOD = 1.0  # seconds
KINDS = {"counter": "COUNTER", "gauge": "GAUGE"}  # version 2.51 of the server has no histograms


class Publisher:
    """Copies an engine's metrics to the server once per second, because the server does not ask for values.

    A context manager: entering starts the thread that copies, leaving ends it. The interface of the server is in
    https://github.com/triton-inference-server/python_backend#custom-metrics.

    Args:
        model: its name in the server, which is a label of every metric.
    """

    def __init__(self, collector: EngineCollector, model: str) -> None:
        self._collector, self._model = collector, model
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD):
            self._publish()

    def _publish(self) -> None:
        for family in self._collector.collect():
            for sample in family.samples if family.type in KINDS else ():
                metric = self._metric(family, sample)
                if family.type == "gauge":
                    metric.set(sample.value)
                else:
                    metric.increment(sample.value - metric.value())

    def _metric(self, family: Metric, sample: Sample) -> Any:
        """The server's metric of a sample; made when it is needed first."""
        key = (sample.name, *sample.labels.values())
        if key not in self._metrics:
            if sample.name not in self._families:
                text, kind = family.documentation, getattr(backend.MetricFamily, KINDS[family.type])
                self._families[sample.name] = backend.MetricFamily(name=sample.name, description=text, kind=kind)
            self._metrics[key] = self._families[sample.name].Metric(labels={"model": self._model} | sample.labels)
        return self._metrics[key]
