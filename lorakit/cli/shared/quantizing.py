"""The options that quantize a base while it loads, as every command that loads one has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ...config import Quantization
from ...config.quantization import COMPUTE_HELP, DOUBLE_HELP, QUANTIZE_HELP, Quantizer

Quantize = Annotated[Quantizer | None, typer.Option(help=QUANTIZE_HELP)]
Double = Annotated[bool, typer.Option("--double/--no-double", help=DOUBLE_HELP)]
ComputeDtype = Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help=COMPUTE_HELP)]


def quantize_flags(how: Quantization) -> dict[str, Any]:
    """Return the options that quantize a base in this way, for `next.command`."""
    compute = None if how.compute_dtype == "auto" else how.compute_dtype
    return {"quantize": how.quantize, "no_double": not how.double, "compute_dtype": compute}
