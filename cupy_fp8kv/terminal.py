"""What all commands print with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

#: Columns of a table that goes into a file or a log.
_WIDTH_WITHOUT_TERMINAL = 200


class CommandError(Exception):
    """What a command stops at: the message is printed, the exit code is 1."""


def console(stderr: bool = False) -> Console:
    """Plain text in, no markup: specialisations print themselves in square brackets."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def progress() -> Progress:
    """A bar on stderr that is gone when it is done."""
    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    return Progress(
        *columns, TimeElapsedColumn(), console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )


def table(title: str, *columns: str, left: int = 1, caption: str | None = None) -> Table:
    """A table whose first ``left`` columns are text and the others numbers."""
    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return made


def write_json(path: Path, record: dict[str, Any]) -> None:
    """The whole of it or none: a command that is cut off leaves what it wrote before."""
    text = json.dumps(record, indent=1) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")  # a pipe
        return
    written = path.with_name(f"{path.name}.tmp")
    written.write_text(text, encoding="utf-8")
    written.replace(path)
