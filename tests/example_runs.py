"""The scripts in examples/, run as a user runs them, but for a few steps."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "trl", minversion="1.16", reason="written for TRL 1.16, whose modules have moved since older releases"
)

FOLDER = Path(__file__).parents[1] / "examples"
WITH_REFERENCE = ("dpo", "kto", "grpo", "rloo")
OTHERS = ("orpo", "reward", "gkd")


def module(name: str):
    """Import a script."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def run(name: str, folder: Path, *more: str):
    """Run a script for two steps, or as the flags `more` say. Returns its trainer."""
    batch = "8" if name in ("grpo", "rloo") else "4"  # a group of completions
    flags = ["--steps", "2", "--rows", "24", "--batch-size", batch, "--learning-rate", "1e-2", "--out", str(folder)]
    return module(name).main([*flags, *more])
