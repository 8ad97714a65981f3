"""The report's figures, as inline SVG.

Covers drawing only: values come from report.py. Text stays text in the SVG, so it takes the page's
font; nothing in a figure depends on when or where it was drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_PASSAGES, _QUERIES = "#0b6e99", "#d98324"
_INK = "#333a42"
_LINES = {None: "-", "int8": "-.", "binary": ":"}  # of lines, by precision
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": "#b8bec6",
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # names of languages and systems are anyone's
}


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quality_by_dim(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """nDCG@10 of every system over the number of components kept; colours: of the systems."""

    def draw(axes: Axes) -> None:
        dims = sorted({row["dim"] for row in rows if row["dim"] is not None})
        x_of_dim = {dim: x for x, dim in enumerate(dims)}
        for system, precision in dict.fromkeys((row["system"], row.get("precision")) for row in rows):
            colour = colours.get(system, _INK)
            own = [row for row in rows if (row["system"], row.get("precision")) == (system, precision)]
            points = sorted((row["dim"], row["ndcg@10"]) for row in own if row["dim"])
            if points:
                across, heights = [x_of_dim[dim] for dim, _ in points], [value for _, value in points]
                style, name = _LINES[precision], f"{system} {precision}" if precision else system
                axes.plot(across, heights, f"o{style}", color=colour, label=name, linewidth=2)
            else:
                flat = own[0]["ndcg@10"]
                axes.axhline(flat, color=colour, linestyle="--", label=system, linewidth=1.5)
        axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
        axes.set_xlim(-0.3, len(dims) - 0.7)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("components kept")
        axes.set_ylabel("nDCG@10")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)

    return _svg("quality-by-dim", draw)


def loss_curves(curves: Mapping[str, Sequence[tuple[int, float]]], colours: Mapping[str, str]) -> str:
    """Training loss over steps, one curve per model or dim: every step faint, the running mean strong."""
    return _svg(f"loss-{'-'.join(curves)}".replace(" ", "-"), _over_steps(curves, colours, "loss"))


def perplexity_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Perplexity over steps on a logarithmic axis, drawn as losses are."""
    draw_lines = _over_steps(curves, {}, "perplexity")

    def draw(axes: Axes) -> None:
        draw_lines(axes)
        axes.set_yscale("log")

    return _svg("perplexity", draw)


def _over_steps(
    curves: Mapping[str, Sequence[tuple[int, float]]], colours: Mapping[str, str], label: str
) -> Callable[[Axes], None]:
    """label: of the axis of values."""

    def draw(axes: Axes) -> None:
        for index, (name, curve) in enumerate(curves.items()):
            steps, losses = (np.asarray(values, dtype=np.float64) for values in zip(*curve, strict=True))
            colour = colours.get(name, f"C{index}")
            axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, _running_mean(losses, max(1, len(losses) // 20)), color=colour, linewidth=2, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend()

    return draw


def share_curves(name: str, curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> str:
    """Shares over steps, one curve for each name. label: of the axis of shares."""

    def draw(axes: Axes) -> None:
        for each, curve in curves.items():
            steps, shares = zip(*curve, strict=True)
            axes.plot(steps, [100 * share for share in shares], linewidth=2, label=each)
        axes.set_ylim(0, 102)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(ncols=1 + (len(curves) - 1) // 8)

    return _svg(name, draw)


def margins(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Histograms of several steps, each with `counts` and `edges`, as densities."""

    def draw(axes: Axes) -> None:
        for index, (name, histogram) in enumerate(histograms.items()):
            counts, edges = (np.asarray(histogram[key], dtype=np.float64) for key in ("counts", "edges"))
            density = counts / max(1.0, counts.sum()) / np.diff(edges)
            axes.stairs(density, edges, color=f"C{index}", linewidth=1.8, label=name)
        axes.axvline(0, color=_INK, linewidth=1)
        axes.set_xlabel("margin")
        axes.set_ylabel("density")
        axes.legend()

    return _svg("margins", draw)


def token_lengths(lengths: Mapping[str, Sequence[float]]) -> str:
    """Histograms of lengths in tokens; `edges` has one value more than each list of counts."""

    def draw(axes: Axes) -> None:
        edges = np.asarray(lengths["edges"], dtype=np.float64)
        for name, colour in (("passages", _PASSAGES), ("queries", _QUERIES)):
            counts = np.asarray(lengths.get(name, ()), dtype=np.float64)
            if counts.sum():
                share = 100 * counts / counts.sum()
                axes.stairs(share, edges, fill=True, alpha=0.35, color=colour)
                axes.stairs(share, edges, color=colour, linewidth=1.8, label=f"{name} ({counts.sum():,.0f})")
        axes.set_xlabel("tokens")
        axes.set_ylabel("share, %")
        axes.legend()

    return _svg("token-lengths", draw)


def time_bars(seconds: Mapping[str, float]) -> str:
    """Wall time of each stage."""

    def draw(axes: Axes) -> None:
        names = list(seconds)
        bars = axes.barh(names, [seconds[name] for name in names], color=_PASSAGES, height=0.65)
        axes.bar_label(bars, [duration(seconds[name]) for name in names], padding=4)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.3 * max(seconds.values()) or 1)
        axes.set_xlabel("seconds")

    return _svg("time", draw, height=1.0 + 0.36 * len(seconds))


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the up to width - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    return (sums[ends] - sums[begins]) / (ends - begins)


def _svg(name: str, draw: Any, height: float = 3.6) -> str:
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', svg)  # several figures share one page
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
