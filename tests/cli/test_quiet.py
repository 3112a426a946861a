"""What libraries say while a pipeline is loaded is hushed, and only then; without diffusers an error says so."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch

from lorakit.bases.load_pipeline import load_pipeline
from lorakit.cli.shared.quiet import quiet_libraries
from lorakit.errors import LorakitError, LorakitWarning


def test_libraries_are_quiet_inside_and_as_before_afterwards():
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "bitsandbytes")]
    with quiet_libraries():
        pass
    before = [logger.level for logger in loggers]
    with quiet_libraries():
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)
        with pytest.warns(LorakitWarning, match="ours"):
            warnings.warn("ours", LorakitWarning, stacklevel=2)
    assert [logger.level for logger in loggers] == before


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.utils", None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[image\]'"), quiet_libraries():
        load_pipeline("embedded", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_quantizers_do_not_warn_in_a_command_of_kernels_that_are_not_needed(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    code = (
        "import logging, lorakit.cli as cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        f"import {library}\n"
        "assert logging.getLogger('bitsandbytes').isEnabledFor(logging.WARNING)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
