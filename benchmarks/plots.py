"""Pictures of results, drawn by matplotlib for `tables.py`."""

# pyright: reportMissingImports=false
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

OURS, RULE, INK = "#1f6feb", "#9aa4b2", "#1f2430"
# What a planned step is spent on, from what computes to what waits.
SPENT = {
    "matmul": "#1f6feb",
    "attention": "#5fa8f5",
    "memory": "#8b7fd4",
    "wait copy": "#d9b26a",
    "wait sparsecore": "#d08a4a",
    "wait ici": "#c8553d",
    "wait dcn": "#8f2d2d",
}
NAMES = {
    "matmul": "products",
    "memory": "memory",
    "wait copy": "waiting for copies",
    "wait sparsecore": "waiting for SparseCores",
    "wait ici": "waiting for links",
    "wait dcn": "waiting for the network",
}


def draw(name: str, shown: Sequence[Any], path: Path, digest: str) -> None:
    """Writes a picture, with the digest of what it shows among its metadata."""
    paint: dict[str, Callable[[Axes, Sequence[Any]], None]] = {
        "training-steps": ratios,
        "generation": ratios,
        "tpu-steps": stacked,
    }
    height = 0.8 + 0.6 * len(shown) if name != "tpu-steps" else 1.2 + 1.1 * len(shown)
    with pyplot.rc_context(
        {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "font.family": "sans-serif"}
    ):
        figure, axes = pyplot.subplots(figsize=(9.6, height), layout="constrained")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        paint[name](axes, shown)
        figure.savefig(path, dpi=100, metadata={"Description": digest, "Software": None})
        pyplot.close(figure)


def ratios(axes: Axes, shown: Sequence[Any]) -> None:
    """Draws ratios of throughput with their intervals, on a scale of logarithms."""
    axes.axvline(1, color=RULE, linewidth=1)
    said = []
    for place, pair in enumerate(shown):
        value, low, high = pair.ratio
        if low is not None:
            axes.plot([low, high], [place, place], color=OURS, linewidth=2, alpha=0.6)
        axes.plot([value], [place], "o", color=OURS, markersize=7)
        ours, theirs = (f"{statistics.median(side):,.0f}" for side in (pair.ours, pair.theirs))
        rounds = f"{len(pair.ours)} rounds" if low is not None else "1 round, no interval"
        said.append(f"{ours} : {theirs} tokens/s\n{rounds}")
    axes.set_xscale("log")
    bounds = [x for pair in shown for x in pair.ratio if x is not None]
    axes.set_xlim(min(0.5, *bounds) / 1.2, max(2.0, *bounds) * 1.2)
    ticks = [x for x in (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 8) if _inside(axes, x)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    places = range(len(shown))
    axes.set_yticks(places, [pair.label.replace(", ", "\n", 1) for pair in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(places, said)
    right.tick_params(length=0)
    right.set_frame_on(False)
    axes.set_xlabel("jaxft's tokens/s over PyTorch's, with 95 % interval: jaxft is faster beyond 1")


def _inside(axes: Axes, x: float) -> bool:
    low, high = axes.get_xlim()
    return low <= x <= high


def stacked(axes: Axes, shown: Sequence[Any]) -> None:
    """Draws planned steps, two bars for each slice, by what their time is spent on."""
    labels, used = [], [kind for kind in SPENT if any(kind in s.ours | s.theirs for s in shown)]
    for number, step in enumerate(shown):
        for place, (program, spent) in enumerate((("jaxft", step.ours), ("MaxText", step.theirs))):
            row, left = 2.4 * number + place, 0.0
            for kind in used:
                width = spent.get(kind, 0.0)
                axes.barh(row, width, left=left, height=0.8, color=SPENT[kind])
                left += width
            axes.annotate(
                f"{left:.2f} s", (left, row), (5, 0), textcoords="offset points", va="center"
            )
            labels.append((row, f"{step.label}   {program}"))
    for kind in used:
        axes.barh(0, 0, color=SPENT[kind], label=NAMES.get(kind, kind))
    axes.set_yticks(*zip(*labels, strict=True))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds of a step as planned, by what they are spent on; nothing was run")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=5, frameon=False, fontsize=9)
