"""``python -m cupy_fp8kv bench``: from its options to tables, files and an exit code."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from .. import terminal
from ..jit.device import cupy_problem
from . import peers, plot, start, suites, table
from .operations import OPERATIONS
from .report import Report


def _split(text: str) -> list[str]:
    return [prefix for prefix in text.split(",") if prefix]


def run(options: argparse.Namespace) -> int:
    parser = options.parser
    try:
        known = {**suites.SUITES, "cache": OPERATIONS, "start": ()}[options.suite]
        wanted = [] if options.source or not known else suites.chosen(options.suite, known, _split(options.shapes))
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    try:
        systems = peers.chosen(["none"] if options.quick else _split(options.peers))
    except ValueError as error:
        parser.error(f"--peers: {error}")
    if options.plot:
        plot.check(options.plot)
    record = _stored(options) if options.source else None
    suite = record["suite"] if record else options.suite
    if suite == "cache" and (options.plot or _split(options.peers) not in ([], ["none"])):
        parser.error("--plot, --peers: suite cache has no shapes to draw and no peers")
    if suite == "start":
        if options.plot or options.markdown or options.shapes:
            parser.error("--plot, --markdown, --shapes: suite start has no shapes")
        return _start(options, record)
    if record is not None:
        return _show(options, _part(options, Report.of(record)))
    if problem := cupy_problem():
        raise terminal.CommandError(f"bench needs a GPU: {problem}")
    from . import measure

    return _show(options, measure.run(options.suite, wanted, fp16=not options.quick, peers=systems))


def _stored(options: argparse.Namespace) -> dict[str, Any]:
    """The record to show. terminal.CommandError if the file holds none."""
    try:
        record = json.loads(options.source.read_text(encoding="utf-8"))
        (start.render if record["suite"] == "start" else Report.of)(record)
        return record
    except OSError as error:
        raise terminal.CommandError(f"--from: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise terminal.CommandError(f"--from: {options.source} is not a record of bench: {error}") from error


def _part(options: argparse.Namespace, report: Report) -> Report:
    """The shapes and peers that were asked for, of a record's."""
    shapes, systems = _split(options.shapes), _split(options.peers)
    rows = tuple(row for row in report.rows if not shapes or row.name.startswith(tuple(shapes)))
    if not rows:
        names = ", ".join(row.name for row in report.rows)
        options.parser.error(f"--shapes: no shape of the record starts with {' or '.join(shapes)}; it has {names}")
    known = {} if options.quick else report.peers
    kept = {name: peer for name, peer in known.items() if not systems or name.startswith(tuple(systems))}
    if report.peers:
        rows = tuple(replace(row, peers={name: row.peers[name] for name in kept if name in row.peers}) for row in rows)
    return replace(report, rows=rows, peers=kept)


def _start(options: argparse.Namespace, stored: dict[str, Any] | None) -> int:
    record = stored or start.record(start.run())
    terminal.console().print(start.render(record))
    if options.json:
        terminal.write_json(options.json, record)
    return 0


def _show(options: argparse.Namespace, report: Report) -> int:
    if options.markdown:
        print(table.markdown(report))
    else:
        console = terminal.console()
        for part in table.render(report):
            console.print(part)
    if options.json:
        terminal.write_json(options.json, report.record())
    if options.plot:
        plot.save(report, options.plot)
    return 1 if report.wrong else 0
