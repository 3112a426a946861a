"""The console that results are printed on."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200  # in a pipe or a file a row should keep its line, so that grep and awk can read it


def output() -> Console:
    """Return a console for stdout: as wide as the terminal (or COLUMNS), and wide in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)


def say(text: str) -> None:
    """Print a sentence: wrapped between words on a terminal, on one line elsewhere."""
    from rich.text import Text

    output().print(Text(text), soft_wrap=not sys.stdout.isatty())


def complain(text: str) -> None:
    """Print an error to stderr: wrapped between words on a terminal, below the first line indented as its own."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr)
        return
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    for line in text.split("\n"):
        margin = " " * (len(line) - len(line.lstrip()) + 2)
        wrapped = textwrap.fill(line, width, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False)
        print(wrapped, file=sys.stderr)
