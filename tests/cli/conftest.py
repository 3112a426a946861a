"""A tiny model, its rows and a trained run, created once; and the command line as a function."""

from __future__ import annotations

import io
import re
import sys

import pytest
import tiny_lm
from tiny_runs import model_folder  # noqa: F401 (a fixture)

from lorakit.cli import run

STARTING = re.compile(r"^lorakit: .* \.\.\.\n", re.MULTILINE)  # what a verb says at once; test_starting.py has it


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(tiny_lm.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return str(tiny_lm.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_lm.rows()))


@pytest.fixture(scope="session")
def trained(model, data, tmp_path_factory):
    """A run's folder, written by `lorakit train`."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run(["train", "--model", model, "--data", data, "--out", str(out), "--quiet", *tiny_lm.FLAGS]) == 0
    return out


@pytest.fixture
def lorakit(capsys, monkeypatch):
    """`lorakit(*args)` returns exit code, stdout, and stderr without the starting line."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args, stdin: str | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, STARTING.sub("", captured.err)

    return call
