"""The types of GGUF's tensors that lorakit writes: numpy arrays of float32 to their bytes, through the `gguf` package.

f32   f16   bf16      rounded to nearest, a number each
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
# The largest error of rounding, over the largest number of a tensor: half a unit in the last of 24, 11 and 8 bits.
# q8_0: half a step of max / 127, and 127 steps of an f16's rounding. Below f16's normal numbers (2^-14) steps are 2^-24
# wide, whatever the number.
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8, Q8_0: (0.5 + 127 * 2.0**-11) / 127}
SMALLEST = {F32: 0.0, F16: 2.0**-25, BF16: 0.0, Q8_0: 127 * 2.0**-25}


def type_of(kind: str) -> Any:
    """The `gguf` package's number for a type."""
    return package().GGMLQuantizationType[kind.upper()]


def bytes_in(shape: tuple[int, ...], kind: str) -> int:
    block, size = package().GGML_QUANT_SIZES[type_of(kind)]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encode(numbers: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Float32 [..., row] in a type, as its bytes. LorakitError for numbers that it cannot hold."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    if numbers.size:
        most = float(np.abs(numbers).max())
        if not np.isfinite(most):
            raise LorakitError(f"'{name}' holds values that are not finite (NaN or infinity)")
        if most > {F16: F16_MOST, Q8_0: 127 * F16_MOST}.get(kind, np.inf):
            raise LorakitError(
                f"'{name}' has values too large for {kind} ({most:.3g})\n"
                "  write the result in another precision: bf16 or f32"
            )
    return package().quantize(numbers, type_of(kind)).view(np.uint8)
