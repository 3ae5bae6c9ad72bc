"""The figure of a report: bars for latency, throughput and quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.errors import UserError, writing

if TYPE_CHECKING:
    from shadowllm.evaluation.speed.report import Report

FIRST, OTHERS = "#7fb2d6", "#c9ced3"  # colours of the first contender and of the others


def draw(report: Report, path: Path) -> None:
    """Save the figure as PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    measured = bool(report.results[0].quality)
    columns = 3 if measured else 2
    figure = new_figure((3.3 * columns, 1.5 + 0.45 * len(report.results)))
    axes = figure.subplots(1, columns, sharey=True)
    names = [result.name for result in report.results]
    summaries = [result.summary for result in report.results]
    average = report.average
    averages = [summary.itl_ms[average] for summary in summaries]
    _bars(axes[0], names, averages, f"Inter-token latency, ms\n({average}, line to 90%)", "{:.1f}")
    tails = [summary.itl_ms["p90"] for summary in summaries]
    axes[0].hlines(range(len(names)), averages, tails, color="#555555", linewidth=1)
    rates = [summary.tokens_per_second for summary in summaries]
    _bars(axes[1], names, rates, "Decode throughput,\ntokens/s", "{:.1f}")
    if measured:
        qualities = [result.quality for result in report.results]
        _bars(
            axes[2],
            names,
            [100 * quality["next_token_agreement"] for quality in qualities],
            "Next-token agreement, %\n(and perplexity)",
            "{:.0f}%",
            [f"  ppl {quality['perplexity']:.1f}" for quality in qualities],
        )
        axes[2].set_xlim(0, 175)
        axes[2].set_xticks([0, 50, 100])
    axes[0].invert_yaxis()
    figure.suptitle(report.title(), fontsize=9, x=0.01, ha="left")
    save(figure, path)


def new_figure(inches: tuple[float, float]) -> Any:
    """Return an empty matplotlib figure that needs no display.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing the figure needs matplotlib", "pip install 'shadowllm[bench]'") from error
    figure = Figure(figsize=inches, layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path) as file:
        figure.savefig(file, format="png")


def _bars(
    axis: Any,
    names: list[str],
    values: list[float],
    title: str,
    label: str,
    notes: list[str] | None = None,
) -> None:
    bars = axis.barh(names, values, color=[FIRST] + [OTHERS] * (len(names) - 1), height=0.6)
    texts = [label.format(value) + note for value, note in zip(values, notes or [""] * len(names), strict=True)]
    # Labels without notes are inside the bar: outside they would collide with the line that marks the tail.
    axis.bar_label(bars, texts, label_type="edge" if notes else "center", padding=2 if notes else 0, fontsize=8)
    axis.set_title(title, fontsize=8, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
