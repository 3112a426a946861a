"""Models whose parameters are spread over processes: what works on them, and an error for what does not.

Attaching needs each weight's own size and values (factors, fingerprint), and so comes before sharding. The factors are
then sharded with the rest, and capturing needs them whole again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import StateError
from ..layers.walk import base_modules


def check_whole(model: nn.Module) -> None:
    """Raise StateError if the model's parameters are sharded (FSDP, DeepSpeed ZeRO-3) or tensor-parallel."""
    how = how_sharded(model)
    if how is not None:
        raise StateError(
            f"{how}, so no adapter can be attached to it any more\n"
            "  attach the adapter to the whole model first, then shard it (fully_shard, accelerate's prepare)\n"
            "  tensor-parallel models are not supported: load the model without tp_plan"
        )


def how_sharded(model: nn.Module) -> str | None:
    """Say which part of the model is sharded, and how: "'model.norm' is ..."; None if every process has all of it."""
    for name, module in base_modules(model):
        how = _wrapped(module) or next((how for p in module._parameters.values() if (how := _spread(p))), None)
        if how is not None:
            return f"{f'{name!r}' if name else 'the model'} is {how}"
    return None


def check_captured(parameters: Iterable[tuple[str, Any]]) -> None:
    """Raise StateError if one of an adapter's named parameters is on this process in part only."""
    for name, parameter in parameters:
        how = _spread(parameter)
        if how is not None:
            raise StateError(
                f"'{name}' is {how}, so this process cannot copy the adapter off the model\n"
                "  gather the state on every process (torch.distributed.checkpoint.state_dict.get_model_state_dict "
                "with full_state_dict=True),\n"
                "  load it into an unsharded model with the same adapter attached, and capture that"
            )


def _wrapped(module: nn.Module) -> str | None:
    """How a module's class says that it is sharded. Only libraries that are imported already can have done so."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        return "wrapped by FullyShardedDataParallel"
    parallel = module.__dict__.get("_tp_size")  # transformers'
    return f"tensor-parallel over {parallel} processes" if isinstance(parallel, int) and parallel > 1 else None


def _spread(parameter: Any) -> str | None:
    """How a parameter is spread over processes; None if it is whole."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(parameter, tensors.DTensor):
        return "sharded over processes (a DTensor, of FSDP2 or tensor parallelism)"
    if hasattr(parameter, "ds_id"):
        return "partitioned by DeepSpeed ZeRO-3"
    return None
