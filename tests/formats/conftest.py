"""The command line as a function, for files that are written back."""

from __future__ import annotations

import pytest

from lorakit.cli import run


@pytest.fixture
def lorakit(capsys):
    """`lorakit(*args)` returns exit code, stdout and stderr."""

    def call(*args: object):
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
