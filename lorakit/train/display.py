"""What a run asks of whoever displays its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Display(Protocol):
    """Displays a run's progress."""

    def row(self, row: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""

    def sample(self, prompt: str, base: str, tuned: str) -> None:
        """Show a prompt with the answers of the base and of the tuned model."""

    def drawn(self, step: int, path: Path) -> None:
        """Say where pictures have been drawn."""

    def note(self, text: str) -> None:
        """Say what the user should know, also if all else is quiet."""
