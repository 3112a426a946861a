"""PEFT 0.2's MergedLinear: a packed projection of which `enable_lora` says which equal parts are adapted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.lora import Factors
from ..config import LoraConfig
from ..errors import AdapterError
from ..ops.packed import expand_packed
from .peft_config import given


def enabled_parts(values: Mapping[str, Any], where: Path | str) -> tuple[bool, ...] | None:
    """PEFT 0.2's `enable_lora`: which equal parts of each target are adapted; None if it is not set. AdapterError if it
    is malformed.
    """
    parts = values.get("enable_lora")
    if not given(parts):
        return None
    if not isinstance(parts, list) or not all(isinstance(p, bool) for p in parts) or not any(parts):
        raise AdapterError(f"{where}: enable_lora is {parts!r}; expected a list of true and false, one true at least")
    return tuple(parts)


def merged_linear(
    module: str, pair: dict[str, Tensor], config: LoraConfig, parts: tuple[bool, ...], where: Path
) -> Factors:
    """PEFT 0.2's MergedLinear: rank and alpha are those of one part, B has the adapted parts below each other.

    `fan_in_fan_out` is not used: that version left it true for linears of both layouts.
    """
    A, B = pair["A"], pair["B"]
    n, rank = sum(parts), config.rank_of(module)
    if (
        A.dim() != 2
        or B.dim() not in (2, 3)
        or B.shape[2:].numel() != 1
        or A.shape[0] != n * rank
        or B.shape[1] != rank
        or B.shape[0] % n
    ):
        raise AdapterError(
            f"{where}: '{module}' has A {list(A.shape)} and B {list(B.shape)}; with enable_lora {list(parts)} and r "
            f"{rank},"
            f" A [{n * rank}, in] and B [a multiple of {n}, {rank}, 1] were expected"
        )
    return Factors(A, expand_packed(B.reshape(n, -1, rank), parts), config.alpha_of(module), parts=parts)
