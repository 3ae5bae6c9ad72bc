"""The report of an evaluation: quality over bytes read per token, as JSON rows and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowllm.bundle.cost_model import Itemsizes, fired_shares, selector_bytes, step_traffic
from shadowllm.bundle.manifest import ITEMSIZE, Manifest
from shadowllm.evaluation.quality import DENSE, Result
from shadowllm.evaluation.speed.figure import new_figure, save
from shadowllm.evaluation.uniform_quantisation import bits_for, uniform_bytes

CONTEXT = 256  # tokens in the cache


def rows(
    results: Sequence[Result], manifest: Manifest, layers: bool = False, uniform: Mapping[int, Result] | None = None
) -> dict[str, Any]:
    """Return the JSON of an evaluation: ``{"dense": {...}, "results": [...], "uniform": [...]}``.

    Each row has ``bytes_per_token``. ``uniform_bits`` of a row of ``results`` names the row of ``uniform`` that is
    the dense model at equal bytes.

    These are the bytes of a decode step over `CONTEXT` tokens, with weights as wide as the bundle stores them. The
    bytes that the selector reads are included; an oracle and a random selection read nothing.

    Args:
        layers: also include the recall per layer.
        uniform: results of `evaluate_uniform`.
    """
    listed = [result.row() | _cost(result, manifest) for result in results]
    if not layers:
        listed = [{name: value for name, value in row.items() if name != "layers"} for row in listed]
    dense = next(row for row in listed if row["selector"] == DENSE)
    return {
        "dense": {"perplexity": dense["perplexity"], "bytes_per_token": dense["bytes_per_token"]},
        "results": [row for row in listed if row is not dense],
        "uniform": [
            {
                "bits": bits,
                "bytes_per_token": uniform_bytes(manifest.spec, bits, CONTEXT, _float_bytes(manifest)),
                "perplexity": result.perplexity,
                "kl": result.kl,
                "top1_agreement": result.top1_agreement,
            }
            for bits, result in (uniform or {}).items()
        ],
    }


def rival_bits(result: Result, manifest: Manifest) -> int | None:
    """Return the bits of the uniform quantisation that reads at most as many bytes per token; None below 2 bits."""
    return bits_for(manifest.spec, _bytes(result, manifest), CONTEXT, _float_bytes(manifest))


def _cost(result: Result, manifest: Manifest) -> dict[str, Any]:
    return {"bytes_per_token": _bytes(result, manifest), "uniform_bits": rival_bits(result, manifest)}


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    """Plot perplexity over megabytes per token, with a line for each selector, head budget, rest and shortlist.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in found["results"]:
        point = (row["bytes_per_token"] / 1e6, row["perplexity"])
        lines.setdefault(_label(row), []).append(point)
    figure = new_figure((6.4, 4.4))
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    if rivals := [(row["bytes_per_token"] / 1e6, row["perplexity"]) for row in found["uniform"]]:
        axes.plot(*zip(*sorted(rivals), strict=True), "k--", marker="s", label="dense, uniformly quantised")
    axes.plot(found["dense"]["bytes_per_token"] / 1e6, found["dense"]["perplexity"], "k*", markersize=12, label=DENSE)
    axes.set(xlabel="MB read per token", ylabel="perplexity", title=title, yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def _label(row: Mapping[str, Any]) -> str:
    parts = [str(row["selector"])]
    parts += [f"{row['head_budget']:.0%} of heads"] if row["head_budget"] != 1 else []
    parts += ["rest from the copy"] if row["rest"] == "shadow" else []
    parts += [f"shortlist {row['shortlist']}"] if row["shortlist"] else []
    parts += ["certified"] if row["certify"] and row["shortlist"] else []
    return ", ".join(parts)


def _float_bytes(manifest: Manifest) -> int:
    """Return the bytes of a norm and of an element of the KV cache."""
    return ITEMSIZE[manifest.dtype]


def _bytes(result: Result, manifest: Manifest) -> int:
    spec, itemsize = manifest.spec, manifest.itemsize
    sizes = Itemsizes.of(_float_bytes(manifest), matrices=itemsize, beside_copy=manifest.itemsize_beside_copy)
    if result.selector == DENSE:
        return step_traffic(spec, sizes, CONTEXT).total
    layers, rest, rank = manifest.sparse_layers, result.rest or "drop", int(manifest.predictor["rank"])
    active = result.budget.counts(layers)
    return step_traffic(
        spec,
        sizes,
        CONTEXT,
        active,
        choosing=selector_bytes(result.selector, layers, itemsize, rank, rest, active),
        rest=rest,
        fired=fired_shares(manifest) if result.selector == "relu" else None,
        shortlist=round(result.recomputed_rows["mean"]) if result.recomputed_rows else None,
    ).total
