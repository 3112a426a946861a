"""Make the vLLM engine from the server's settings: the rank and the number of adapters that vLLM is started for."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from ...adapter.adapter import Adapter
from ...adapter.algebra.edit import as_lora
from ...bases.load import load_tokenizer
from ...errors import ConfigError
from ..settings import ServeSettings
from ..start import Built
from .argv import VllmSettings, command_line, rank_flag
from .base import BaseShell
from .engine import VllmEngine

CONFIG = "adapter_config.json"
DEFAULT_RANK = 16  # vLLM's own: at least this, for adapters that are loaded later
# Settings of the embedded engine, each with the way to have it with vLLM.
_NOT_HERE = {
    "prefix_memory": "vLLM has a prefix cache of its own: --vllm-arg=--gpu-memory-utilization=0.9 sets its memory",
    "quantization": "give a folder that is quantized already, or --vllm-arg=--quantization=bitsandbytes",
}


def build(settings: ServeSettings) -> Built:
    """Read what vLLM must be told when it starts, and make an engine, not started.

    Raises ConfigError for settings that vLLM does not have, LorakitError for a base or an adapter that cannot be read.
    """
    defaults = ServeSettings("", "")
    for name, way_out in _NOT_HERE.items():
        if getattr(settings, name) != getattr(defaults, name):
            flag = "quantize" if name == "quantization" else name.replace("_", "-")
            raise ConfigError(f"--{flag} is for the embedded engine, and the engine is vllm\n  {way_out}")
    shell = BaseShell(settings.base)
    rank = _rank(settings)
    made = VllmSettings(
        settings.base,
        tuple(shlex.split(settings.vllm or "vllm")),
        max_rank=rank,
        batched=settings.device_adapters,
        in_memory=settings.device_adapters + settings.adapter_memory // shell.bytes_of_adapter(rank),
        context=settings.context,
        rows=settings.rows,
        precision=None if settings.precision == "auto" else settings.precision,
        extra=settings.vllm_arguments,
    )
    command_line(made, "")  # so that a contradiction in --vllm-arg shows before anything is started
    engine = VllmEngine(made, shell=shell, waiting=settings.guard.limits.waiting)
    return Built(engine, load_tokenizer(settings.base), sorted(shell.ends))


def _rank(settings: ServeSettings) -> int:
    """Return the value of --max-lora-rank. Raises ConfigError if --max-rank is less than an adapter needs."""
    named = {name: as_lora(Adapter.load(path)).rank for name, path in settings.adapters.items()}
    if settings.max_rank is None:
        return rank_flag([*named.values(), *_ranks_below(settings.roots)], DEFAULT_RANK)
    flag = rank_flag([], settings.max_rank)
    large = next((name for name, rank in named.items() if rank > flag), None)
    if large is not None:
        raise ConfigError(
            f"'{large}' has rank {named[large]}, and --max-rank is {settings.max_rank}\n"
            "  raise it, or leave it out: it is then what the adapters need"
        )
    return flag


def _ranks_below(roots: tuple[Path, ...]) -> Iterator[int]:
    """Yield the ranks that PEFT's configs below the roots state. Reading all the weights there would take too long."""
    for root in roots:
        for folder, _, files in os.walk(root):
            if CONFIG in files:
                yield _stated_rank(Path(folder) / CONFIG)


def _stated_rank(config: Path) -> int:
    """Return the largest rank in a PEFT config; 1 if it states none: what is wrong with it shows when it is loaded."""
    try:
        stated = json.loads(config.read_text(encoding="utf8"))
        found = [stated.get("r"), *(stated.get("rank_pattern") or {}).values()]
    except (OSError, ValueError, AttributeError):
        return 1
    return max([1, *(rank for rank in found if isinstance(rank, int) and rank <= 512)])
