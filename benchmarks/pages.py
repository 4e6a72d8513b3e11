"""Tables and plots of `docs/benchmarks.md`, drawn from the latest records between the page's markers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, Spread
from benchmarks.records import Record

PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "figures"

# Mid-tones, read on light and on dark pages alike.
INK, COLOURS = "#808080", ("#3b82f6", "#e07a1f", "#16a374", "#a855f7")


def table(record: Record) -> str:
    """The rows as Markdown, with the run they come from. Columns that no row fills are left out."""
    columns = {
        "what": [row.what for row in record.rows],
        "against": [row.peer for row in record.rows],
        "result": [shown(row) for row in record.rows],
        "smallest to largest": [_range(row.figure, row.unit) for row in record.rows],
        "pairs": [str(row.figure.count) if row.figure.count > 1 else "" for row in record.rows],
        "target": [_target(row) for row in record.rows],
        "peak memory": [_sides(row.memory, _megabytes) for row in record.rows],
        "score": [_sides(row.score, str) for row in record.rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join([*lines, "", *_origin(record)])


def shown(row: Row) -> str:
    """The figure as people read it."""
    return f"**{_number(row.figure.median, row.unit)}** {row.unit}"


def _range(spread: Spread, unit: str) -> str:
    return f"{_number(spread.low, unit)} to {_number(spread.high, unit)}" if spread.count > 1 else ""


def _number(value: float, unit: str) -> str:
    return f"{value:.3f}" if unit in ("s more", "ms") else f"{value:.2f}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    bound = f"at most {row.target:g}" if row.at_most else f"{row.target:g}"
    return f"{bound}: {'reached' if row.reached else 'not reached'}"


def _sides(values: Mapping[str, object], show: object) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())  # type: ignore[operator]


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def _origin(record: Record) -> Iterator[str]:
    machine, versions, settings = record.machine, record.versions, record.settings
    load = f", load {machine['load']} before the run" if machine.get("load") is not None else ""
    accelerator = machine["accelerator"] or "no accelerator"
    thresholds = "raised" if any(name.startswith("MALLOC") for name in settings) else "glibc's own"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    yield f"`{record.command}`, {record.date} UTC, commit {record.commit}; {machine['processor']},"
    yield f"{machine['cores']} cores, {machine['vector']}, {machine['memory_gb']} GB, {accelerator}{load};"
    yield f"{_count(settings['threads'])}, {settings['clock']} time, allocator thresholds {thresholds}; Python"
    yield f"{versions['python']}, {packages}."


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def redraw(records: Mapping[str, Record], page: Path = PAGE) -> list[str]:
    """Puts the tables of the records between their markers; the rest of the page stays as it is.

    Returns:
        Benchmarks that the page has no markers for.
    """
    text = page.read_text(encoding="utf-8")
    unplaced = []
    for name, entry in records.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start not in text or end not in text:
            unplaced.append(name)
            continue
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table(entry)}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
    return unplaced


def lines_plot(
    path: Path, series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, title: str
) -> None:
    """Writes an SVG with one line a series; the same figures give the same file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "veneer", "font.size": 10, **dict.fromkeys(inked, INK)}
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for (name, points), colour in zip(series.items(), COLOURS, strict=False):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker="o", color=colour)
            axes.annotate(name, (x[-1], y[-1]), (6, 0), textcoords="offset points", color=colour, va="center")
        axes.set(xlabel=across, ylabel=up, title=title, ylim=(0, None), xticks=x)
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.15)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n", encoding="utf-8")
