"""A report as tables, for a terminal and for a Markdown document."""

from __future__ import annotations

import statistics
from typing import Any

from rich.text import Text

from .. import terminal
from .report import PeerFigure, Report, Row
from .suites import Shape


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def render(report: Report) -> list[Any]:
    """Our table, and one of the peers if there are any."""
    if report.suite == "cache":
        return [_cache_table(report)]
    base = report.base
    planned = any(row.plan_us for row in report.rows)
    relative = [f"to {base.shape.name}'s"] if base else []
    table = terminal.table(
        _title(report), "shape", "KV MB", "limit µs", "ours µs", "of limit", *relative, "GB/s", "fp16 cache µs",
        "speedup", "host µs", *(["plan µs", "plan of limit", "plan host µs"] if planned else []), "error",
        caption=report.method,
    )  # fmt: skip
    for row in report.rows:
        table.add_row(
            row.shape.name, f"{row.kv_bytes / 1e6:.1f}", f"{row.limit_us:.2f}", f"{row.us:.2f}", f"{row.fraction:.3f}",
            *([f"{row.fraction / base.fraction:.3f}"] if base else []), f"{row.gb_per_second:.0f}",
            _or_dash(row.fp16_us, ".2f"), _or_dash(row.speedup, ".2f"), f"{row.host_us:.1f}",
            *(_plan_cells(row) if planned else []), Text(f"{row.error:.1e}", style="red" if row.wrong else ""),
        )  # fmt: skip
    return [table, *([_peer_table(report)] if report.peers else []), *map(Text, _reasons(report))]


def _title(report: Report) -> str:
    machine = report.machine
    return f"{report.suite}: {machine['device']}, CuPy {machine['cupy']}, driver for CUDA {machine['driver_cuda']}"


def _cache_table(report: Report) -> Any:
    table = terminal.table(
        _title(report), "", "", "MB", "limit µs", "ours µs", "of limit", "GB/s", "host µs", "times faster", "error",
        left=2, caption=report.method,
    )  # fmt: skip
    for row in report.rows:
        table.add_row(
            row.name, row.what, f"{row.nbytes / 1e6:.1f}", f"{row.limit_us:.2f}", f"{row.us:.2f}",
            f"{row.fraction:.3f}", f"{row.gb_per_second:.0f}", f"{row.host_us:.1f}", _or_dash(row.times_faster, ".2f"),
            Text(f"{row.error:.1e}", style="red" if row.wrong else ""),
        )  # fmt: skip
    return table


def _plan_cells(row: Row) -> list[str]:
    fraction = row.plan_us and row.limit_us / row.plan_us
    return [_or_dash(row.plan_us, ".2f"), _or_dash(fraction, ".3f"), _or_dash(row.plan_host_us, ".1f")]


def _peer_table(report: Report) -> Any:
    table = terminal.table(
        "peers: µs, of the limit", "shape", "ours", *report.peers,
        caption="; ".join(f"{name}: {peer.title} ({peer.version})" for name, peer in report.peers.items()),
    )  # fmt: skip
    for row in report.rows:
        table.add_row(
            row.shape.name, f"{row.us:.1f} {row.fraction:.2f}", *(_peer_cell(row, name) for name in report.peers)
        )
    table.add_section()
    table.add_row("host µs, median", *(_or_dash(value, ".0f") for value in _median_host_us(report)))
    return table


def _peer_cell(row: Row, peer: str) -> str:
    """``-``: no such case, or not measured; ``x``: failed."""
    figure = row.peers.get(peer, PeerFigure(skipped=True))
    if figure.us is None:
        return "-" if figure.skipped else "x"
    return f"{figure.us:.1f} {row.limit_us / figure.us:.2f}"


def _median_host_us(report: Report) -> list[float | None]:
    """Ours, then each peer's."""
    columns: list[list[float | None]] = [[row.host_us for row in report.rows]]
    columns += [[row.peers[name].host_us for row in report.rows if name in row.peers] for name in report.peers]
    known = [[value for value in column if value is not None] for column in columns]
    return [statistics.median(values) if values else None for values in known]


def _reasons(report: Report) -> list[str]:
    """Why peers failed, each reason once for a peer."""
    lines: dict[str, None] = {}
    for row in report.rows:
        for name, figure in row.peers.items():
            if figure.reason and not figure.skipped:
                lines.setdefault(f"{name} failed on {row.shape.name}: {figure.reason}")
    return list(lines)


def markdown(report: Report) -> str:
    """The table as a document has it: ours, and the fraction of the limit of each family's fastest."""
    if report.suite == "cache":
        return _cache_markdown(report)
    families = report.families
    base = report.base
    head = ["shape", "requests × rows, heads, head_dim", "K and V", "read limit", "time", "of the limit"]
    head += ["of E4M3FN's fraction"] if base else []
    speedups = any(row.speedup for row in report.rows)
    head += ["against fp16"] if speedups else []
    head += ["host", *families]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in report.rows:
        cells = [
            f"`{row.shape.name}`", _describe(row.shape), f"{row.kv_bytes / 1e6:.0f} MB", f"{row.limit_us:.1f} µs",
            f"{row.us:.1f} µs", f"{row.fraction:.3f}",
        ]  # fmt: skip
        cells += [f"{row.fraction / base.fraction:.3f}"] if base else []
        cells += [_or_dash(row.speedup, ".2f")] if speedups else []
        cells.append(f"{row.host_us:.0f} µs")
        cells += [_or_dash(max_fraction(row, names), ".2f") for names in families.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cache_markdown(report: Report) -> str:
    head = ["", "operation", "read and written", "limit", "time", "of the limit", "GB/s", "host", "times faster"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in report.rows:
        cells = (
            f"`{row.name}`", row.what, f"{row.nbytes / 1e6:.1f} MB", f"{row.limit_us:.1f} µs", f"{row.us:.1f} µs",
            f"{row.fraction:.3f}", f"{row.gb_per_second:.0f}", f"{row.host_us:.0f} µs",
            _or_dash(row.times_faster, ".2f"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def max_fraction(row: Row, peers: list[str]) -> float | None:
    return max((fraction for name in peers if (fraction := row.peer_fraction(name)) is not None), default=None)


def _describe(shape: Shape) -> str:
    rows = str(shape.kv_len) if shape.kv_lens is None else f"{min(shape.kv_lens)}…{max(shape.kv_lens)}"
    pages = f", pages of {shape.page_size}" if shape.page_size else ""
    return f"{shape.batch} × {rows}, {shape.num_qo_heads}/{shape.num_kv_heads}, {shape.head_dim}{pages}"
