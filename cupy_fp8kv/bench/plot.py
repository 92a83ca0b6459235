"""The figure: how much of the read limit each shape reaches, ours and the peers'. Matplotlib is only imported here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .. import terminal
from .report import Report
from .table import max_fraction

_OURS = "#1f6f43"
_PEERS = ("#4878a8", "#d08a3c", "#9a6fb0", "#8c8c8c", "#b8b04a", "#5fb0b0")
#: Inches of a bar, of the room between shapes, and of everything but bars.
_BAR, _GAP, _FRAME = 0.14, 0.12, 1.5
_WIDTH = 9.0


def check(path: Path) -> None:
    """terminal.CommandError where no figure could be written: to be asked before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise terminal.CommandError('a plot needs matplotlib: pip install "cupy_fp8kv[plot]"')
    if not path.absolute().parent.is_dir():
        raise terminal.CommandError(f"--plot: no such folder: {path.absolute().parent}")


def draw(report: Report) -> Any:
    """Horizontal bars, a group a shape: ours first, then the fastest way of each family of peers."""
    from matplotlib.figure import Figure

    families = report.families
    labels = [
        "cupy_fp8kv",
        *(f"{name}, fastest of {len(of)}" if len(of) > 1 else name for name, of in families.items()),
    ]
    colours = [_OURS, *(_PEERS[index % len(_PEERS)] for index in range(len(families)))]
    group = _BAR * len(labels) + _GAP
    height = group * len(report.rows) + _FRAME
    figure = Figure(figsize=(_WIDTH, height), dpi=120)
    axes = figure.add_subplot()
    for index, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        places = [group * at + _BAR * (index + 0.5) for at in range(len(report.rows))]
        values = [
            row.fraction if index == 0 else max_fraction(row, families[list(families)[index - 1]])
            for row in report.rows
        ]
        axes.barh(places, [value or 0.0 for value in values], 0.9 * _BAR, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                weight = "bold" if index == 0 else "normal"
                axes.text(value + 0.006, place, f"{value:.2f}", va="center", fontsize=6.5, weight=weight)
    middle = _BAR * len(labels) / 2
    between = "\n" if len(labels) > 2 else ", "  # two lines need the room of three bars
    axes.set_yticks(
        [group * at + middle for at in range(len(report.rows))],
        [f"{row.shape.name}{between}{row.kv_bytes / 1e6:.0f} MB" for row in report.rows], fontsize=7.5,
    )  # fmt: skip
    axes.set_ylim(group * len(report.rows) - _GAP / 2, -_GAP / 2)
    axes.set_xlim(0, 1.05)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("fraction of the read limit of the same run (1: as fast as the device reads the cache)", fontsize=8)
    axes.set_title(f"{report.suite}, {report.machine['device']}, sources {report.sources}", fontsize=9, loc="left")
    if families:
        figure.legend(loc="lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.45 / height if families else 0, 1, 1))
    return figure


def save(report: Report, path: Path) -> None:
    """Write the figure, in the format that the name says. terminal.CommandError if matplotlib knows no such format."""
    try:
        draw(report).savefig(path)
    except ValueError as error:
        raise terminal.CommandError(f"--plot: {error}") from error
