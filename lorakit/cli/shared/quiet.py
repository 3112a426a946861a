"""Silence the libraries while a pipeline is loaded: warnings of deprecations, and of packages that are not needed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, only errors of diffusers, transformers and bitsandbytes are shown. Ours are as ever."""
    other = logging.getLogger("bitsandbytes")
    level = other.level
    other.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\b")
        logs = _libraries_logs()
        before = [log.get_verbosity() for log in logs]
        for log in logs:
            log.set_verbosity_error()
        try:
            yield
        finally:
            for log, verbosity in zip(logs, before):
                log.set_verbosity(verbosity)
            other.setLevel(level)


def _libraries_logs() -> list[Any]:
    """Import the libraries, which sets the level of their loggers, and return what can change it."""
    from transformers.utils import logging as transformers_logging

    try:
        from diffusers.utils import logging as diffusers_logging
    except ImportError:  # `load_pipeline` says how to install it
        return [transformers_logging]
    return [diffusers_logging, transformers_logging]
