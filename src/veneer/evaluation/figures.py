"""The figures of the report, as SVG text to be placed inside an HTML page.

Text and axes are drawn in `currentColor`, so that one figure reads well on a light and on a dark page. Nothing here
touches `pyplot`: its global state and its choice of a window system have no place in a library.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid-tones that keep their contrast on white and on near-black, and stay apart for colour-blind readers.
PALETTE = ("#3b82f6", "#e07a1f", "#16a374", "#a855f7", "#e0457b", "#8a9a1a", "#0ea5b7", "#8b6f5c")

# Stands for the page's text colour while matplotlib draws; no palette entry comes near it.
_INK = "#010203"

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "veneer",  # the same results give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One run's log, ready to draw.

    Args:
        label: How the run is named in the legend.
        loss: Training loss as (epoch, value).
        held_out_loss: Held-out loss as (epoch, value), epoch 0 being the untrained model.
        score: Held-out score as (epoch, value); empty where the loss is the score.
    """

    label: str
    loss: Sequence[tuple[float, float]]
    held_out_loss: Sequence[tuple[float, float]]
    score: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One run in the score-against-parameters figure."""

    label: str
    parameters: int
    score: float


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, the same wherever the label appears in the report."""
    unique = list(dict.fromkeys(labels))
    return {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(unique)}


def learning_curves(
    curves: Sequence[Curve], palette: Mapping[str, str], score_name: str, majority: float | None
) -> str:
    """Loss on the left, held-out score on the right (only where it is not the loss itself)."""
    scored = any(curve.score for curve in curves)
    with _style():
        figure = _figure(9.6 if scored else 5.6, 3.7)
        loss_axes = figure.add_subplot(1, 2 if scored else 1, 1)
        for curve in curves:
            colour = palette[curve.label]
            _line(loss_axes, _smoothed(curve.loss), colour, alpha=0.6, linewidth=1.2)
            _line(loss_axes, curve.held_out_loss, colour, linestyle="--", marker="o", markersize=4)
        loss_axes.set(title="Loss (solid: training, smoothed; dashed: held out)", xlabel="epoch")
        loss_axes.locator_params("x", integer=True)
        if scored:
            axes = figure.add_subplot(1, 2, 2)
            for curve in curves:
                _line(axes, curve.score, palette[curve.label], marker="o", markersize=4)
            axes.set(title=f"Held-out {score_name} (epoch 0: before training)", xlabel="epoch")
            axes.locator_params("x", integer=True)
            _majority(axes, majority)
        _legend(figure, [curve.label for curve in curves], palette)
        return _svg(figure)


def score_against_parameters(
    points: Sequence[Point], palette: Mapping[str, str], score_name: str, majority: float | None
) -> str:
    """What each trained parameter buys: held-out score over the number of trained parameters, which is logarithmic."""
    with _style():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        figure = _figure(5.6, 3.7)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for i, point in enumerate(sorted(points, key=lambda point: point.parameters)):
            position = (point.parameters, point.score)
            axes.plot(*position, "o", color=palette[point.label], markersize=9)
            # Above and below in turn: neighbours on the axis often have nearly the same score.
            offset = (0, 9) if i % 2 == 0 else (0, -17)
            axes.annotate(point.label, position, xytext=offset, textcoords="offset points", ha="center")
        axes.margins(0.25)
        axes.set(title=f"Held-out {score_name} after training", xlabel="trained parameters")
        _majority(axes, majority)
        return _svg(figure)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float], title: str) -> str:
    """A value for each row and column as a colour, logarithmic where all are positive; empty where there is none."""
    with _style():
        import numpy as np
        from matplotlib.colors import LogNorm, Normalize

        grid = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
        known = grid[np.isfinite(grid)]
        several = known.size and known.min() > 0 and known.max() > known.min()
        norm: Any = LogNorm() if several else Normalize()
        figure = _figure(max(4.6, 2.6 + 0.55 * len(columns)), max(2.6, 1.9 + 0.24 * len(rows)))
        axes = figure.add_subplot()
        image = axes.pcolormesh(np.ma.masked_invalid(grid), norm=norm, cmap="viridis", edgecolors="none")
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set(title=title, ylabel="layer")
        figure.colorbar(image, ax=axes)
        return _svg(figure)


def trade_off(points: Sequence[Point], score_name: str, *, larger_is_better: bool) -> str:
    """Score over trained parameters of many runs; those that no other beats in both are joined and named."""
    front = best_for_their_size(points, larger_is_better=larger_is_better)
    with _style():
        figure = _figure(8.4, 4.4)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        others = [point for point in points if point not in front]
        axes.plot([p.parameters for p in others], [p.score for p in others], "o", color=PALETTE[5], alpha=0.6)
        line = ([p.parameters for p in front], [p.score for p in front])
        axes.plot(*line, "o-", color=PALETTE[0], drawstyle="steps-post", markersize=7)
        for i, point in enumerate(front):
            offset = (6, 8) if i % 2 == 0 else (6, -14)
            position = (point.parameters, point.score)
            axes.annotate(point.label, position, xytext=offset, textcoords="offset points", fontsize=8)
        axes.margins(0.12)
        axes.set(title=f"Held-out {score_name} against trained parameters", xlabel="trained parameters")
        return _svg(figure)


def best_for_their_size(points: Sequence[Point], *, larger_is_better: bool) -> list[Point]:
    """The points that no other beats with as few parameters, by their parameters.

    >>> best_for_their_size([Point("a", 5, 0.8), Point("b", 9, 0.7), Point("c", 9, 0.9)], larger_is_better=True)
    [Point(label='a', parameters=5, score=0.8), Point(label='c', parameters=9, score=0.9)]
    """
    sign = -1 if larger_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.parameters, sign * point.score)):
        if not front or sign * point.score < sign * front[-1].score:
            front.append(point)
    return front


def require() -> None:
    """Says so early where no figure can be drawn.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    _style()


def _style() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedError(
            "The report needs matplotlib, which is not installed. Install it with: pip install 'veneer[report]'"
        ) from error
    return matplotlib.rc_context(_STYLE)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each loss as the mean of its neighbourhood, a tenth of the curve wide: single batches are mostly noise.

    >>> _smoothed([(1.0, 2.0), (2.0, 4.0)])
    [(1.0, 2.0), (2.0, 4.0)]
    """
    reach = len(points) // 20
    near = [[y for _, y in points[max(0, i - reach) : i + reach + 1]] for i in range(len(points))]
    return [(x, sum(losses) / len(losses)) for (x, _), losses in zip(points, near, strict=True)]


def _short_count(value: float) -> str:
    """
    >>> _short_count(500), _short_count(50_000), _short_count(2e6)
    ('500', '50k', '2M')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _line(axes: "Axes", points: Sequence[tuple[float, float]], colour: str, **style: Any) -> None:
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, **style)


def _majority(axes: "Axes", majority: float | None) -> None:
    if majority is None:
        return
    axes.axhline(majority, color=_INK, linestyle=":", linewidth=1, alpha=0.6)
    axes.annotate(
        f"majority class {majority:.2f}",
        (1, majority),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _legend(figure: "Figure", labels: Sequence[str], palette: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    # Drawn by hand: a line's own legend entry would list the training and the held-out curve of each run.
    handles = [Line2D([], [], color=palette[label], linewidth=3, label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))


def _svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # the XML and DOCTYPE lines have no place inside HTML
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # several figures on one page would repeat these names
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's font
    opening, body = text.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)  # the page decides how wide the figure is
    return f'{opening} role="img">{body}'.replace(_INK, "currentColor")
