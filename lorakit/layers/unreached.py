"""Which of a base's weights no adapter can reach: parameters of modules without a low-rank update.

Some models hold the experts of a mixture of experts as parameters of a module that does not say what it computes
(`expert_weight`), so that "all-linear" leaves most of such a model as it is. That has to be said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..errors import listing
from .bases import base_of
from .expert_weight import expert_weights
from .saved import BASE, saved_of
from .swap import mixin_for
from .walk import base_modules

SMALLEST = 0.01  # a share worth a line: norms, biases and position tables are below


@dataclass(frozen=True)
class Unreached:
    """`names`: elements by parameter name, numbers in it as "*"; `share`: of the base's elements, 0 to 1."""

    names: dict[str, int]
    share: float

    def __str__(self) -> str:
        return f"{100 * self.share:.3g} % of the base's weights, which no target reaches: {listing(self.names, 4)}"


def unreached(model: nn.Module, saved: Collection[str] = ()) -> Unreached | None:
    """Return the matrices and stacks of matrices that no adapter can reach, the largest first; None below one percent.

    `saved`: parameters that an adapter trains and saves in full.
    """
    names: dict[str, int] = {}
    total = 0
    seen: set[int] = set()
    for module_name, module in base_modules(model):
        child = saved_of(module)
        own = child.get(BASE) if child else {}  # the base's, whichever version is in use
        adaptable, base = mixin_for(module) is not None, base_of(module)
        reached = {weight.parameter for weight in expert_weights(module)}
        packed: tuple[str, ...] = ()
        if adaptable and base.quantization is not None:
            packed = base.stored(module)
            key = next((id(p) for n in packed if (p := module._parameters.get(n)) is not None), id(module))
            total += 0 if key in seen else math.prod(base.shape(module))
            seen.add(key)
        for last, in_use in module._parameters.items():
            parameter = own.get(last, in_use)
            if parameter is None or id(parameter) in seen or last in packed:
                continue
            seen.add(id(parameter))
            size = parameter.numel()
            total += size
            full = f"{module_name}.{last}" if module_name else last
            # A vector that broadcasts, such as a class token [1, 1, d], is no matrix.
            is_matrix = parameter.dim() > 1 and min(parameter.shape[-2:]) > 1
            if is_matrix and not adaptable and last not in reached and full not in saved:
                pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", full)
                names[pattern] = names.get(pattern, 0) + size
    share = sum(names.values()) / total if total else 0.0
    if share < SMALLEST:
        return None
    return Unreached(dict(sorted(names.items(), key=lambda item: -item[1])), share)
