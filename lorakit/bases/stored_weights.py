"""How the weights of a base's linears are stored, and how many bytes that takes, read from settings or a config.

Bytes of a weight [out, in], n = out · in elements:

    nf4, fp4 (bitsandbytes)     n/2 + 4·n/64: a scale for each block of 64; 4.5 bits a weight
      with double quantization  n/2 + n/64 + 4·n/(64·256): 4.127 bits (Dettmers et al. 2023, section 3), and its tables
    int8 (bitsandbytes)         n + 4·out: one scale a row
    int8 (torchao)              n + 5·out: a scale in float32 and a zero of 8 bits a row
    GPTQ                        b·n/8 + (2·out + b·out/8)·groups + 4·in: fp16 scales, packed zeros, a group per input
    AWQ                         b·n/8 + (2·out + b·out/8)·groups
    HQQ, quanto, compressed     b·n/8 + scales (and zeros) by group or row in 16 bits

Nothing here needs torch or the quantizer's package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config import Quantization

BLOCK, BLOCKS = 64, 256  # weights that share a scale in nf4 and fp4; scales that share one in double quantization
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_CODES = 16 * 4  # bytes of the table of 16 values that every quantized weight has of its own
_SCALE_CODES = 256 * 4 + 4  # the table of 256 for quantized scales, and their mean

Size = Callable[[int, int, int], int]  # (out, in, bytes an element of the base's dtype) -> bytes of the weight


@dataclass(frozen=True)
class Storage:
    """How the weights of a base's linears are stored.

    method: as a config names it; title: in words; size: the bytes of one weight, None where this is not known;
    quantizer: the value of `quantize` that gives this storage; new: whether it is quantized only while loading; kept:
    names of modules that stay unquantized, None for the rule of `quantize.linears_of`; keeps: what a forward keeps
    until its backward though it need not, its input (bitsandbytes' int8 on a CPU) or the dense weight (torchao);
    in_blocks: whether only decoder layers are quantized; compute: the name of the dtype that weights are multiplied in,
    None for the base's.
    """

    method: str
    title: str
    size: Size | None
    quantizer: str | None = None
    new: bool = False
    kept: tuple[str, ...] | None = None
    keeps: Literal["input", "weight"] | None = None
    in_blocks: bool = False
    compute: str | None = None


def storage(how: Quantization) -> Storage | None:
    """Return the storage of weights that are quantized while loading; None if nothing is."""
    if how.quantize is None:
        return None
    if how.quantize == "int8":
        return Storage("bitsandbytes", "bitsandbytes int8, a scale a row", _int8, how.quantize, True, keeps="input")
    if how.quantize == "torchao-int8":
        return Storage("torchao", "torchao int8, a scale a row", _torchao, how.quantize, True, keeps="weight")
    return Storage(
        "bitsandbytes",
        _four_bit_title(how.quantize, how.double),
        _four_bits(how.double),
        how.quantize,
        True,
        compute=_DTYPES.get(how.compute_dtype),
    )


def storage_of(config: Any) -> Storage | None:
    """Return the storage that a base's transformers config records; None for one that is not quantized.

    A way of quantizing that is not known here has a title and no size.
    """
    how = getattr(config, "quantization_config", None)
    if how is None and hasattr(config, "get_text_config"):
        how = getattr(config.get_text_config(), "quantization_config", None)
    if how is None:
        return None
    how = how if isinstance(how, Mapping) else how.to_dict()
    method = str(getattr(how.get("quant_method"), "value", how.get("quant_method") or "bitsandbytes"))
    read = _METHODS.get(method)
    try:
        return Storage(method, method, None) if read is None else read(how)
    except (TypeError, ValueError):  # a damaged setting, which whatever loads the weights names
        return Storage(method, method, None)


def _four_bit_title(kind: str, double: bool) -> str:
    return f"bitsandbytes {kind}{', scales quantized too' if double else ''}"


def _four_bits(double: bool) -> Size:
    def size(rows: int, columns: int, element: int) -> int:
        blocks = math.ceil(rows * columns / BLOCK)
        scales = blocks + 4 * math.ceil(blocks / BLOCKS) + _SCALE_CODES if double else 4 * blocks
        return math.ceil(rows * columns / 2) + scales + _CODES

    return size


def _int8(rows: int, columns: int, element: int) -> int:
    return rows * columns + 4 * rows


def _torchao(rows: int, columns: int, element: int) -> int:
    return rows * columns + 5 * rows


def _grouped(bits: int, group: int | None, by_input: int = 0, zeros: float | None = None) -> Size:
    """Return the size of weights in groups of inputs that share a scale of 16 bits and a zero.

    `group`: inputs in a group, None for all; `by_input`: further bytes for each input; `zeros`: bits of a zero, None
    for as many as a weight has.
    """

    def size(rows: int, columns: int, element: int) -> int:
        groups = 1 if group is None or group <= 0 else math.ceil(columns / group)
        of_scales = groups * rows * (16 + (bits if zeros is None else zeros)) / 8
        return math.ceil(rows * columns * bits / 8) + math.ceil(of_scales) + by_input * columns

    return size


def _bitsandbytes(how: Mapping[str, Any]) -> Storage:
    kept = None if how.get("llm_int8_skip_modules") is None else tuple(how["llm_int8_skip_modules"])
    if how.get("load_in_8bit") or how.get("_load_in_8bit"):
        return Storage("bitsandbytes", "bitsandbytes int8, a scale a row", _int8, "int8", kept=kept, keeps="input")
    kind, double = how.get("bnb_4bit_quant_type", "fp4"), bool(how.get("bnb_4bit_use_double_quant"))
    compute = str(how.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    return Storage("bitsandbytes", _four_bit_title(kind, double), _four_bits(double), kind, kept=kept, compute=compute)


def _gptq(how: Mapping[str, Any]) -> Storage:
    bits, group = int(how.get("bits", 4)), _group(how.get("group_size", 128))
    return Storage("gptq", _title("GPTQ", bits, group), _grouped(bits, group, by_input=4), in_blocks=True)


def _awq(how: Mapping[str, Any]) -> Storage:
    bits = int(how.get("bits", how.get("w_bit", 4)))
    group = _group(how.get("group_size", how.get("q_group_size", 128)))
    return Storage(
        "awq", _title("AWQ", bits, group), _grouped(bits, group), kept=tuple(how.get("modules_to_not_convert") or ())
    )


def _hqq(how: Mapping[str, Any]) -> Storage:
    settings: Any = how.get("quant_config") or {}
    weights = settings.get("weight_quant_params") if isinstance(settings, Mapping) else None
    kept = tuple(how.get("skip_modules") or ())
    if not isinstance(weights, Mapping):
        return Storage("hqq", "HQQ", None, kept=kept)
    bits, group = int(weights.get("nbits", 4)), weights.get("group_size", 64)
    return Storage("hqq", _title("HQQ", bits, group), _grouped(bits, group, zeros=16), kept=kept)


def _quanto(how: Mapping[str, Any]) -> Storage:
    kind, kept = str(how.get("weights", "int8")), tuple(how.get("modules_to_not_convert") or ())
    bits = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}.get(kind)
    if bits is None:
        return Storage("quanto", f"quanto {kind}", None, kept=kept)
    size = _grouped(bits, None, zeros=0) if bits == 8 else _grouped(bits, 128, zeros=16)
    return Storage("quanto", f"quanto {kind}", size, kept=kept)


def _compressed(how: Mapping[str, Any]) -> Storage:
    groups: Any = how.get("config_groups") or {}
    kinds = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    kept = tuple(each for each in how.get("ignore") or () if not each.startswith("re:"))
    if len(kinds) != 1 or not isinstance(kinds[0], Mapping):
        return Storage("compressed-tensors", "compressed-tensors", None, kept=kept)
    bits, group = int(kinds[0].get("num_bits", 8)), kinds[0].get("group_size")
    return Storage(
        "compressed-tensors", _title("compressed-tensors", bits, group), _grouped(bits, group, zeros=0), kept=kept
    )


def _torchao_config(how: Mapping[str, Any]) -> Storage:
    kind = (how.get("quant_type") or {}).get("default") or {}
    name, kept = str(kind.get("_type", "")), tuple(how.get("modules_to_not_convert") or ())
    if name == "Int8WeightOnlyConfig":
        return Storage("torchao", "torchao int8, a scale a row", _torchao, "torchao-int8", kept=kept, keeps="weight")
    return Storage("torchao", f"torchao {name.removesuffix('Config')}".strip(), None, kept=kept)


def _group(value: Any) -> int | None:
    return None if value is None else int(value)


def _title(method: str, bits: int, group: Any) -> str:
    return f"{method}, {bits} bits" + (f", groups of {group}" if isinstance(group, int) and group > 0 else "")


_METHODS: dict[str, Callable[[Mapping[str, Any]], Storage]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "hqq": _hqq,
    "quanto": _quanto,
    "compressed-tensors": _compressed,
    "torchao": _torchao_config,
}
