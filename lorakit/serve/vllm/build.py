"""Make the vLLM engine from the server's settings: the child's flags, among them the largest rank it must hold."""

from __future__ import annotations

import shlex

from ...errors import ConfigError
from ..settings import ServeSettings
from ..start import Built

DEFAULT_RANK = 16  # vLLM's own; where no adapter of the command line has a larger one, and --max-rank is not given
DEFAULT_IN_MEMORY = 64


def build(settings: ServeSettings) -> Built:
    """Make an engine, not started. Raises ConfigError for settings that are the embedded engine's."""
    from ...adapter.adapter import Adapter
    from ...bases.load import end_tokens, load_tokenizer, model_path
    from .argv import VllmSettings, rank_flag
    from .engine import VllmEngine

    if settings.quantization.quantize is not None:
        raise ConfigError(
            "--quantize: vLLM loads a checkpoint as it is stored\n"
            "  give it a quantized one (GPTQ, AWQ, ...) as the base, or use --engine embedded"
        )
    ranks = [Adapter.load(path).rank for path in settings.adapters.values()]
    engine = VllmEngine(
        VllmSettings(
            model_path(settings.base),
            command=tuple(shlex.split(settings.vllm or "vllm")),
            max_rank=rank_flag(ranks, settings.max_rank or DEFAULT_RANK),
            batched=settings.device_adapters,
            in_memory=max(4 * settings.device_adapters, DEFAULT_IN_MEMORY),
            context=settings.context,
            rows=settings.rows,
            precision=None if settings.precision == "auto" else settings.precision,
        ),
        waiting=settings.guard.limits.waiting,
    )
    return Built(engine, load_tokenizer(settings.base), end_tokens(settings.base))
