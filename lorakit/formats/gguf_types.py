"""Encode float32 arrays in the tensor types of GGUF that lorakit writes, through the `gguf` package.

f32   f16   bf16      rounded to nearest, element by element
q8_0                  blocks of 32 along a row: a scale d = max|x| / 127 in f16, and round(x / d) as int8
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import LorakitError
from .gguf_names import package

F32, F16, BF16, Q8_0 = "f32", "f16", "bf16", "q8_0"
KINDS = (F32, F16, BF16, Q8_0)
BLOCK = 32
F16_MOST = 65_504.0
# The largest rounding error relative to a tensor's largest element: half a unit in the last of 24, 11 and 8 bits.
# q8_0: half a step of max / 127, plus 127 times the rounding of the scale in f16. SMALLEST: the absolute error below
# f16's normal range (2^-14), where steps are 2^-24 wide.
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8, Q8_0: (0.5 + 127 * 2.0**-11) / 127}
SMALLEST = {F32: 0.0, F16: 2.0**-25, BF16: 0.0, Q8_0: 127 * 2.0**-25}


def type_of(kind: str) -> Any:
    """The `gguf` package's enum value of a type. `kind`: one of `KINDS`."""
    return package().GGMLQuantizationType[kind.upper()]


def bytes_in(shape: tuple[int, ...], kind: str) -> int:
    """The size in bytes of a tensor of this shape and type."""
    block, size = package().GGML_QUANT_SIZES[type_of(kind)]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encode(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Encode [..., row], converted to float32, as bytes. `name`: the tensor's, for errors. LorakitError for NaN,
    infinity and values too large for the type.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.size:
        most = float(np.abs(values).max())
        if not np.isfinite(most):
            raise LorakitError(f"'{name}' holds values that are not finite (NaN or infinity)")
        if most > {F16: F16_MOST, Q8_0: 127 * F16_MOST}.get(kind, np.inf):
            raise LorakitError(
                f"'{name}' has values too large for {kind} ({most:.3g})\n"
                "  write the result in another precision: bf16 or f32"
            )
    return package().quantize(values, type_of(kind)).view(np.uint8)
