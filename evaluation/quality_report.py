"""The report of an evaluation: quality over bytes read per token, as JSON rows and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shadowllm.bundle.cost_model import selector_bytes, step_traffic
from shadowllm.bundle.manifest import Manifest
from shadowllm.evaluation.quality import DENSE, Result
from shadowllm.evaluation.speed.figure import new_figure, save
from shadowllm.models.sparsity import Budget

CONTEXT = 256  # tokens in the cache


def rows(results: Sequence[Result], manifest: Manifest, layers: bool = False) -> dict[str, Any]:
    """Return the JSON of an evaluation: ``{"dense": {...}, "results": [...]}``, each with ``bytes_per_token``.

    These are the bytes of a decode step over `CONTEXT` tokens, with weights as wide as the bundle stores them. The
    bytes that the selector reads are included; an oracle and a random selection read nothing.

    Args:
        layers: also include the recall per layer.
    """
    listed = [asdict(result) | {"bytes_per_token": _bytes(result, manifest)} for result in results]
    if not layers:
        listed = [{name: value for name, value in row.items() if name != "layers"} for row in listed]
    dense = next(row for row in listed if row["selector"] == DENSE)
    return {
        "dense": {"perplexity": dense["perplexity"], "bytes_per_token": dense["bytes_per_token"]},
        "results": [row for row in listed if row is not dense],
    }


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    """Plot perplexity over megabytes per token, with a line for each selector and head budget.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    lines: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for row in found["results"]:
        point = (row["bytes_per_token"] / 1e6, row["perplexity"])
        lines.setdefault((row["selector"], row["head_budget"]), []).append(point)
    figure = new_figure((6.4, 4.4))
    axes = figure.subplots()
    for (selector, heads), points in lines.items():
        label = selector if heads == 1 else f"{selector}, {heads:.0%} of heads"
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.plot(found["dense"]["bytes_per_token"] / 1e6, found["dense"]["perplexity"], "k*", markersize=12, label=DENSE)
    axes.set(xlabel="MB read per token", ylabel="perplexity", title=title, yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def _bytes(result: Result, manifest: Manifest) -> int:
    spec, itemsize = manifest.spec, manifest.itemsize
    floats = 4 if manifest.quantisation else itemsize
    if result.selector == DENSE:
        return step_traffic(spec, int(floats), CONTEXT, matrix_itemsize=itemsize).total
    active = Budget(heads=result.head_budget, neurons=result.neuron_budget).counts(manifest.sparse_layers)
    choosing = selector_bytes(result.selector, manifest.sparse_layers, itemsize, int(manifest.predictor["rank"]))
    return step_traffic(spec, int(floats), CONTEXT, active, choosing=choosing, matrix_itemsize=itemsize).total
