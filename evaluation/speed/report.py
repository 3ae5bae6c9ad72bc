"""The report of a benchmark, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.bundle.cost_model import Traffic
from shadowllm.errors import writing
from shadowllm.evaluation.speed.harness import Summary

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Result:
    """The result of one contender.

    Attributes:
        traffic: bytes that it must read per decode step; None if unknown.
        quality: ``next_token_agreement`` with the baseline, ``perplexity``, ``tokens``; empty if not measured.
        recomputed_rows: see `RecomputedRows.summary`; empty without a shortlist.
        lossless: what the drafts of each run gave (`DraftRecord.to_dict`); empty without drafts.
        same_tokens: whether the first run has the baseline's tokens; None if that is not asked.
    """

    name: str
    summary: Summary
    traffic: Traffic | None = None
    quality: dict[str, float] = field(default_factory=dict)
    recomputed_rows: dict[str, float] = field(default_factory=dict)
    lossless: Sequence[dict[str, Any]] = ()
    same_tokens: bool | None = None

    @property
    def gb_per_second(self) -> float | None:
        """Bytes per token divided by the median inter-token latency."""
        return self.traffic.total / self.summary.itl_ms["median"] / 1e6 if self.traffic else None

    def to_dict(self) -> dict[str, Any]:
        """Return an entry of the report's ``results``."""
        summary = self.summary
        return {
            "name": self.name,
            "ttft_ms": summary.ttft_ms,
            "itl_ms": summary.itl_ms,
            "tokens_per_second": summary.tokens_per_second,
            "tokens_per_second_spread": list(summary.tokens_per_second_spread),
            "bytes_per_token": self.traffic.total if self.traffic else None,
            "bytes_by_part": self.traffic.parts if self.traffic else None,
            "gb_per_second": self.gb_per_second,
            "peak_rss_mb": summary.peak_rss_mb,
            "device_memory": summary.device_memory,
            "parts_ms": summary.parts_ms,
            "fired": summary.fired,
            "quality": self.quality,
            "recomputed_rows": self.recomputed_rows,
            "lossless": list(self.lossless),
            "same_tokens": self.same_tokens,
        }


@dataclass(frozen=True)
class Report:
    """The report of a whole benchmark.

    Attributes:
        settings: the benchmark's settings: model, prompt length, new tokens, runs, warm-up, budgets.
        bandwidth_gb_s: measured read bandwidth, the upper limit; None if it was not measured.
        comparison: one entry per pair, ``{"name", "baseline", "speedup": {"median", "min", "max"}}``. A speedup is the
            ratio of the median inter-token latencies of a run; with lossless decoding, of the means.
        predictor: cost of the predictor, ``ms_per_token``, ``share_of_step`` and ``bytes_per_token``; empty if it
            was not measured.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: Sequence[Result]
    comparison: Sequence[dict[str, Any]]
    bandwidth_gb_s: float | None = None
    predictor: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON that ``--json`` writes."""
        return {
            "environment": self.environment,
            "settings": self.settings,
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "results": [result.to_dict() for result in self.results],
            "comparison": list(self.comparison),
            "predictor": self.predictor,
        }

    def save_json(self, path: Path) -> None:
        """Write the report.

        Raises:
            UserError: the folder does not exist or cannot be written.
        """
        with writing(path) as file:
            file.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def print(self, console: Console) -> None:
        """Print the table, a summary line for each contender in the wording of trtexec, and the comparison."""
        from rich.table import Table

        console.print(self.title(), highlight=False, soft_wrap=True)  # a table's own title wraps at the table's width
        table = Table(header_style="bold")
        table.add_column("", no_wrap=True)
        for result in self.results:
            table.add_column(result.name, justify="right", no_wrap=True)
        columns = [self._cells(result) for result in self.results]
        for row in columns[0]:
            cells = [column.get(row, "-") for column in columns]
            if set(cells) != {"-"}:
                table.add_row(row, *cells)
        console.print(table)
        for result in self.results:
            console.print(latency_line(result), highlight=False, soft_wrap=True)
        for line in self._closing_lines():
            console.print(line, highlight=False, soft_wrap=True)

    def title(self) -> str:
        """Return the model and the settings in one line."""
        s = self.settings
        return (
            f"{s['model']}: prompt {s['prompt_len']} + {s['new_tokens']} new tokens, {s['runs']} runs, "
            f"{self.environment['threads']} threads"
        )

    @property
    def average(self) -> str:
        """The average of the inter-token latencies; tokens of lossless decoding come several at once."""
        return "mean" if self.settings.get("lossless") else "median"

    def _cells(self, result: Result) -> dict[str, str]:
        summary, itl, quality = result.summary, result.summary.itl_ms, result.quality
        cells = {
            "TTFT, ms": f"{summary.ttft_ms['median']:.1f}",
            f"ITL {self.average}, ms": f"{itl[self.average]:.2f}",
            "ITL percentile(90%), ms": f"{itl['p90']:.2f}",
            "ITL percentile(99%), ms": f"{itl['p99']:.2f}",
            "Throughput, tokens/s": f"{summary.tokens_per_second:.1f}",
            "Peak RSS, MB": f"{summary.peak_rss_mb:.0f}",
            "GPU memory, MB": f"{sum(summary.device_memory.values()) / 1e6:.0f}" if summary.device_memory else "-",
        }
        if summary.fired:
            cells["Neurons that fired"] = f"{sum(summary.fired) / len(summary.fired):.1%}"
        if result.traffic and result.gb_per_second:
            share = f" ({result.gb_per_second / self.bandwidth_gb_s:.0%})" if self.bandwidth_gb_s else ""
            cells |= {
                "Bytes touched, MB/token": f"{result.traffic.total / 1e6:.1f}",
                "Bandwidth reached, GB/s": f"{result.gb_per_second:.1f}{share}",
            }
        if result.recomputed_rows:
            cells |= {
                "Exact output rows": f"{result.recomputed_rows['mean']:.0f}",
                "Steps beyond the shortlist": f"{result.recomputed_rows['fallback_share']:.1%}",
            }
        if result.same_tokens is not None:
            cells["Same tokens"] = "yes" if result.same_tokens else "no"
        if result.lossless:
            accepted, drafted, drafts = (
                sum(run[name] for run in result.lossless) for name in ("accepted", "drafted", "drafts")
            )
            if drafts:
                cells["Accepted per draft"] = (
                    f"{accepted / drafts:.2f} of {drafted / drafts:.2f} ({accepted / drafted:.0%})"
                )
        if quality:
            cells |= {
                "Next-token agreement": f"{quality['next_token_agreement']:.1%}",
                "Perplexity": f"{quality['perplexity']:.2f}",
            }
        return cells

    def _closing_lines(self) -> list[str]:
        lines = []
        for pair in self.comparison:
            ratio = pair["speedup"]
            lines.append(
                f"{pair['name']} against {pair['baseline']}: {ratio['median']:.2f}x per token "
                f"({ratio['min']:.2f}x to {ratio['max']:.2f}x over runs)"
            )
        if self.settings.get("backend") == "ort" and "dense" in self.results[0].summary.parts_ms:
            lines.append(f"{self.results[0].name}: this budget leaves out less than the predictor reads: decoded dense")
        if self.predictor:
            p = self.predictor
            lines.append(
                f"Predictor: {p['ms_per_token']:.3f} ms per token, {p['share_of_step']:.1%} of a step, "
                f"{p['bytes_per_token'] / 1e6:.2f} MB"
            )
        if self.bandwidth_gb_s:
            lines.append(
                f"Memory: {self.bandwidth_gb_s:.1f} GB/s measured read bandwidth; percentages in the table are of it"
            )
        return lines


def latency_line(result: Result) -> str:
    """Return a summary of the inter-token latency in the wording of trtexec."""
    itl = result.summary.itl_ms
    tails = "".join(
        f", percentile({name[1:]}%) = {value:.3f} ms" for name, value in itl.items() if name[0] == "p" and name != "p50"
    )
    low, high = result.summary.tokens_per_second_spread
    return (
        f"{result.name}: Latency: min = {itl['min']:.3f} ms, max = {itl['max']:.3f} ms, "
        f"mean = {itl['mean']:.3f} ms, median = {itl['median']:.3f} ms{tails}; "
        f"Throughput: {result.summary.tokens_per_second:.1f} tokens/s "
        f"({low:.1f} to {high:.1f} over runs)"
    )
