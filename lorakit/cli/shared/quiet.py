"""Hush what the libraries say while a pipeline is loaded: of deprecations, and of packages that are not needed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, only errors of diffusers, transformers and bitsandbytes are shown. Ours are as ever."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
