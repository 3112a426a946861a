"""`nn.MultiheadAttention` among a config's targets: the module, whose in_proj_weight is adapted, and its out_proj.

As in PEFT, naming the attention adapts both. Its out_proj alone cannot be: nothing calls it, only an adapted attention
reads its update. `exclude` leaves out_proj out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import TargetError
from .swap import mixin_for

OUTPUT = "out_proj"


def why_not(module: nn.Module) -> str | None:
    """Say why an attention of torch's kind cannot be adapted; None if it can, or is no such attention."""
    if not isinstance(module, nn.MultiheadAttention) or mixin_for(module) is not None:
        return None
    if module.in_proj_weight is None:
        return "it has separate weights for q, k and v (kdim, vdim), which lorakit does not adapt (nor does PEFT)"
    if not isinstance(module.out_proj, nn.Linear):
        return f"its out_proj is a {type(module.out_proj).__name__}; expected a Linear"
    return f"{type(module).__name__} has a forward of its own"


def unadapted(names: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the attentions that "all-linear" leaves out, with the reason."""
    found = {name: why_not(module) for name, module in names.items()}
    return {name: why for name, why in found.items() if why is not None}


def with_output(names: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the chosen modules, with the out_proj of each attention among them."""
    attentions = {n for n, m in chosen.items() if isinstance(m, nn.MultiheadAttention) and mixin_for(m) is not None}
    added = {f"{name}.{OUTPUT}" for name in attentions}
    return {n: m for n, m in names.items() if n in chosen or n in added} if added - chosen.keys() else dict(chosen)


def check_output(names: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module]) -> None:
    """Raise TargetError for an out_proj among the chosen modules whose attention is not."""
    for name in chosen:
        attention, _, last = name.rpartition(".")
        holder = names.get(attention)
        if last == OUTPUT and isinstance(holder, nn.MultiheadAttention) and attention not in chosen:
            why = why_not(holder)
            what = "nn.MultiheadAttention reads its weight without calling it, so an update there would have no effect"
            fix = (
                f"  exclude it (LoraConfig.exclude): {why}"
                if why is not None
                else f"  name the attention, '{attention.rpartition('.')[2]}', which includes it"
            )
            raise TargetError(f"'{name}' cannot be adapted alone: {what}\n{fix}")
