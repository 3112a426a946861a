"""Hush what the libraries say while a pipeline is loaded: of deprecations, and of packages that are not needed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, only errors of diffusers, transformers and bitsandbytes are shown. Ours are as ever."""
    other = logging.getLogger("bitsandbytes")
    level = other.level
    other.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\b")
        # These set the level of their loggers when they are first imported.
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        logs = (diffusers_logging, transformers_logging)
        before = [log.get_verbosity() for log in logs]
        for log in logs:
            log.set_verbosity_error()
        try:
            yield
        finally:
            for log, verbosity in zip(logs, before):
                log.set_verbosity(verbosity)
            other.setLevel(level)
