"""Settings of a base that is quantized while it is loaded. Without torch: `lorakit/bases/quantize.py` acts on them."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from .strict import Strict

Quantizer = Literal["nf4", "fp4", "int8", "torchao-int8"]
QUANTIZERS: tuple[str, ...] = get_args(Quantizer)
FOUR_BITS = ("nf4", "fp4")  # the quantizers that have scales by block, and a precision of their own to compute in

QUANTIZE_HELP = (
    "quantize the base's linear weights while loading: nf4 or fp4 (4 bits), int8, by bitsandbytes; torchao-int8"
)
DOUBLE_HELP = "nf4, fp4: quantize the scales too, 4.13 instead of 4.5 bits a weight"
COMPUTE_HELP = "nf4, fp4: the precision to multiply in; auto: the base's"


class Quantization(Strict):
    """How a base is quantized while it is loaded. Raises ConfigError for settings that the quantizer does not have."""

    quantize: Quantizer | None = Field(None, description=QUANTIZE_HELP)
    double: bool = Field(True, description=DOUBLE_HELP)
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description=COMPUTE_HELP)

    @model_validator(mode="after")
    def _of_four_bits(self):
        for setting, default in (("double", True), ("compute_dtype", "auto")):
            if getattr(self, setting) != default and self.quantize not in FOUR_BITS:
                raise ValueError(f"{setting} needs quantize: nf4 or quantize: fp4; omit it, or give one of these")
        return self
