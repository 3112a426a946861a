"""Adapters that know each expert as a module, on models that hold the experts of a layer as one parameter.

Adapters trained with transformers 4 have `...experts.3.w1`; transformers 5 stacks these linears. Their factors become
those of the stack: of gate and up, which are one matrix there, A is the one below the other and B block-diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.expert_names import ExpertNames, ways
from ..adapter.experts import ExpertFactors
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..errors import AdapterError
from ..layers.expert_weight import ExpertWeight
from ..layers.targets import module_names


def stacked(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with the updates of single experts joined to those of the model's stacks; itself if it has
    none. Raises AdapterError for experts whose factors do not fit together.
    """
    if not any(".experts." in name for name in adapter.updates):
        return adapter
    names = module_names(model)
    updates = dict(adapter.updates)
    for parameter, module in names.items():
        if not isinstance(module, ExpertWeight) or parameter in updates:
            continue
        experts = module.weight.shape[0]
        for way in ways(parameter):
            own = {n: u for e in range(experts) for n in way.of(e) if (u := updates.get(n)) is not None}
            if own and not any(n in names for n in own):
                updates = {n: u for n, u in updates.items() if n not in own}
                updates[parameter] = _stack(parameter, module, way, own)
                break
    if updates.keys() == adapter.updates.keys():
        return adapter
    targets = sorted({name.rpartition(".")[2] for name in updates})
    return replace(adapter, config=adapter.config.replace(targets=targets), updates=updates)


def _stack(parameter: str, module: ExpertWeight, way: ExpertNames, own: Mapping[str, Update]) -> ExpertFactors:
    for name, update in own.items():
        if not isinstance(update, Factors) or update.kind != "linear" or update.parts:
            raise AdapterError(
                f"'{name}' is an expert of '{parameter}' in this model, which takes plain LoRA only, not an update of "
                f"kind '{update.variant}'"
            )
    experts, *sizes = module.weight.shape
    size_out, size_in = reversed(sizes) if module.is_transposed else sizes
    rows = size_out // len(way.projections)
    each = []
    for e in range(experts):
        parts = [own.get(name) for name in way.of(e)]
        factors = [f if isinstance(f, Factors) else _zero(rows, size_in) for f in parts]
        wrong = next((f for f in factors if f.sizes != (rows, size_in)), None)
        if wrong is not None:
            raise AdapterError(
                f"'{way.of(e)[0]}' and its kind are [{rows}, {size_in}] in this model's '{parameter}'; the adapter's "
                f"factors are for {list(wrong.sizes)}"
            )
        A = torch.cat([f.A.float() for f in factors])
        B = torch.block_diag(*(f.B.float() * f.scale for f in factors))
        each.append(Factors(A, B, float(len(A))))  # scale 1
    return ExpertFactors.of_experts(each, module.is_transposed)


def _zero(out: int, size_in: int) -> Factors:
    return Factors(torch.zeros(1, size_in), torch.zeros(out, 1), 1.0)
