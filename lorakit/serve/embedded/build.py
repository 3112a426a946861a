"""Make the embedded engine from the server's settings: load the base, its tokenizer, and the tiers around them."""

from __future__ import annotations

from ..settings import ServeSettings
from ..start import Built


def build(settings: ServeSettings) -> Built:
    """Load the base and make an engine on it, not started. Raises LorakitError for a base that it cannot serve."""
    from ...bases.device import choose_device, choose_dtype
    from ...bases.load import end_tokens, load_model, load_tokenizer
    from .engine import EmbeddedEngine
    from .grammar import Grammars
    from .prefixes import Prefixes
    from .tiers import Tiers

    device = choose_device().value
    dtype = choose_dtype(settings.precision, device).value
    tokenizer = load_tokenizer(settings.base)
    model = load_model(settings.base, dtype, device, quantization=settings.quantization)
    ends = end_tokens(settings.base)
    engine = EmbeddedEngine(
        model,
        base=settings.name,
        rows=settings.rows,
        context=settings.context,
        waiting=settings.guard.limits.waiting,
        tiers=Tiers(model, tokenizer, device=settings.device_adapters, memory_bytes=settings.adapter_memory),
        prefixes=Prefixes(settings.prefix_memory),
        grammars=Grammars(tokenizer, ends),
    )
    return Built(engine, tokenizer, ends)
