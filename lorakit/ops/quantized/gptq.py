"""The format of GPTQ checkpoints (Frantar et al. 2022; the layout is that of the library AutoGPTQ).

    W[o, i] = scales[g, o] · (q[i, o] − z[g, o])        g = g_idx[i], the group of input i

    qweight  int32 [in · bits / 32, out]     q, packed along the inputs
    qzeros   int32 [groups, out · bits / 32] z, packed along the outputs; format "gptq" stores z − 1, "gptq_v2" z
    scales   float [groups, out]
    g_idx    int32 [in]                      without it, or without activation order, g = i // group_size

With 2, 3, 4 or 8 bits. In activation order (`desc_act`) the groups hold inputs of similar importance instead of
neighbours, so that g_idx is any assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ...errors import LorakitError
from .int32 import WORD, pack, unpack

TITLE = "GPTQ"  # what a base with such weights is said to be
BITS = (2, 3, 4, 8)
NAMES = ("qweight", "qzeros", "scales", "g_idx")  # of a module's tensors; g_idx may be missing
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class Settings:
    """How a weight is quantized. `group_size`: inputs per scale, -1 for all; `symmetric`: z is the middle code;
    `plus_one`: the files hold z − 1 (format "gptq").
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    plus_one: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read a model's `quantization_config`. Libraries call the format `checkpoint_format`, `format`, or both.

        Raises LorakitError for a format that is none of `FORMATS`, for two different ones, and other bits than `BITS`.
        """
        stated = {key: plain(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
        key, form = next(iter(stated.items()), ("checkpoint_format", "gptq"))
        if len(set(stated.values())) > 1:
            raise LorakitError(
                "GPTQ weights in two formats (quantization_config): "
                + ", ".join(f"{key} is '{form}'" for key, form in stated.items())
                + "\n  expected the same in both, as gptqmodel writes them"
            )
        if form not in FORMATS:
            raise LorakitError(
                f"GPTQ weights in the format '{form}' (quantization_config.{key}), which is made for one "
                f"kernel\n  expected {' or '.join(FORMATS)}: convert the checkpoint with gptqmodel"
            )
        bits = whole(config, "bits")
        if bits not in BITS:
            raise LorakitError(f"GPTQ weights of {bits} bits (quantization_config.bits)\n  expected 2, 3, 4 or 8")
        return cls(bits, group_size(config, "group_size"), bool(config.get("sym", True)), form == "gptq")


def whole(config: Mapping[str, Any], key: str) -> int:
    """Return a setting that is a whole number. Raises LorakitError, naming it, for anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise LorakitError(f"quantization_config.{key} is {value!r}\n  expected a whole number, as {key}: 4 is")
    return value


def group_size(config: Mapping[str, Any], key: str) -> int:
    """Return the inputs per scale: 128 where a config does not say, -1 (all of them) for None and 0."""
    return 128 if key not in config else -1 if not config[key] else whole(config, key)


def plain(value: Any) -> str:
    """Return a setting's text; a library's config object holds some as an enumeration's member."""
    return str(getattr(value, "value", value))


def shapes(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[int, int]:
    """Return (in, out) of a packed weight. Raises LorakitError if its tensors do not fit together."""
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    size_in, size_out = qweight.shape[0] * WORD // settings.bits, qweight.shape[1]
    groups, g_idx = scales.shape[0], tensors.get("g_idx")
    expected = {"qzeros": (groups, size_out * settings.bits // WORD), "scales": (groups, size_out), "g_idx": (size_in,)}
    found = {"qzeros": qzeros, "scales": scales} | ({} if g_idx is None else {"g_idx": g_idx})
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name]:
            raise LorakitError(
                f"{name} is {list(tensor.shape)}, expected {list(expected[name])} beside a qweight of "
                f"{list(qweight.shape)} with {settings.bits} bits"
            )
    return size_in, size_out


def zeros(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return z of each group and output: [groups, out], int16."""
    return unpack(tensors["qzeros"].T, settings.bits).T.to(torch.int16) + int(settings.plus_one)


def groups_of(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return the group of each input: [in], int64."""
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        return g_idx.long()
    size_in = tensors["qweight"].shape[0] * WORD // settings.bits
    return _neighbours(size_in, settings.group_size, tensors["qweight"].device)


def dequantized(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return the weight [out, in], float32. Raises LorakitError if the tensors do not fit together."""
    shapes(tensors, settings)
    group = groups_of(tensors, settings)
    codes = unpack(tensors["qweight"], settings.bits).float()  # [in, out]
    codes -= zeros(tensors, settings).float()[group]
    codes *= tensors["scales"].float()[group]
    return codes.T


def rounding(tensors: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return how far quantization may have moved each element: 2.75 steps. [out, in], float32.

    GPTQ rounds to the nearest code what is left after it has made up for the rounding of earlier inputs. Of 49,000
    elements, 99.9 % ended within 1.7 to 2.6 steps of their own value, all within 4.6 (2 to 8 bits, with and without
    activation order, correlated inputs of different sizes).
    """
    return 2.75 * tensors["scales"].float().abs()[groups_of(tensors, settings)].T


def quantized(
    W: Tensor, settings: Settings, g_idx: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Round a weight [out, in] to the nearest codes. `g_idx` [in]: the group of each input; None: neighbours. `dtype`:
    of the scales.

    Raises LorakitError if the sizes do not fill words of 32 bits.
    """
    size_out, size_in = W.shape
    for what, size in (("inputs", size_in), ("outputs", size_out)):
        if size * settings.bits % WORD:
            raise LorakitError(f"{size} {what} of {settings.bits} bits do not fill words of 32 bits")
    group = _neighbours(size_in, settings.group_size, W.device) if g_idx is None else g_idx.long()
    by_input = W.detach().float().T  # [in, out]
    scales, z = grid(by_input, group, settings, dtype)
    highest = 2**settings.bits - 1
    codes = (by_input / scales.float()[group] + z[group]).round().clamp(0, highest)
    return {
        "qweight": pack(codes, settings.bits),
        "qzeros": pack((z - int(settings.plus_one)).T, settings.bits).T.contiguous(),
        "scales": scales,
        "g_idx": group.int(),
    }


def grid(by_input: Tensor, group: Tensor, settings: Settings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scales [groups, out] in `dtype` and z [groups, out] of codes that reach from the least to the largest
    weight of each group. `by_input`: the weight as [in, out]; `group` [in]: of each input.
    """
    highest = 2**settings.bits - 1
    members = [by_input[group == g] for g in range(int(group.max()) + 1)]
    low, high = (torch.stack([extreme(own, 0) for own in members]) for extreme in (torch.amin, torch.amax))
    low, high = low.clamp_max(0), high.clamp_min(0)  # 0 is in each range
    if settings.symmetric:
        largest = torch.maximum(-low, high)
        low, high = -largest, largest
    elif settings.plus_one:
        low = torch.minimum(low, -high / (highest - 1))  # z >= 1, since z - 1 is stored
    scales = ((high - low) / highest).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)  # a group of zeros
    if settings.symmetric:
        return scales, torch.full_like(low, (highest + 1) // 2)
    return scales, (-low / scales.float()).round().clamp(int(settings.plus_one), highest)


def _neighbours(size_in: int, group_size: int, device: torch.device) -> Tensor:
    return torch.arange(size_in, device=device) // (size_in if group_size == -1 else group_size)
