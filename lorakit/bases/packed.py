"""Load GPTQ and AWQ checkpoints with lorakit's own linears, through transformers' `from_pretrained`.

transformers reads such checkpoints only with gptqmodel and optimum. Here it reads the files as for any model (shards,
tied weights, generation settings), and its hook for quantizers puts `own_linear`'s modules in place of the linears
whose packed weights are in the files. Afterwards the model's config says again what the checkpoint's says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import LorakitError, listing
from .own_linear import KINDS, settings_of

_NAME = "lorakit-packed"  # our quantizer's name in transformers' table


def own_config(config: Any) -> Any:
    """Return a copy of a GPTQ or AWQ checkpoint's config which makes any `from_pretrained(..., config=...)` load it
    with `own_linear`'s modules.
    """
    own = copy.deepcopy(config)
    part = own if getattr(own, "quantization_config", None) is not None else own.get_text_config(decoder=True)
    how = _how(config)
    KINDS[how["quant_method"]].codec.Settings.of(how)  # before anything is read
    part.quantization_config = {"quant_method": _NAME, "original": how}
    return own


def _how(config: Any) -> dict[str, Any]:
    how = getattr(config, "quantization_config", None)
    if how is None and hasattr(config, "get_text_config"):
        how = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if how is None:
        return {}
    return dict(how if isinstance(how, Mapping) else how.to_dict())


@register_quantization_config(_NAME)
class _Config(QuantizationConfigMixin):
    """`original`: the checkpoint's own."""

    def __init__(self, original: dict[str, Any], quant_method: str = _NAME) -> None:
        self.original, self.quant_method = original, quant_method  # type: ignore[assignment]


@register_quantizer(_NAME)
class _Quantizer(HfQuantizer):
    """transformers' interface to a way of loading quantized weights."""

    quantization_config: _Config

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        replace_linears(model, self.quantization_config.original, kwargs["checkpoint_files"])

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        model.config.quantization_config = self.quantization_config.original
        # With these, transformers would ask the library that is not there for saving and training.
        del model.hf_quantizer
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def replace_linears(model: nn.Module, how: Mapping[str, Any], files: Sequence[str | Path]) -> None:
    """Put packed linears, on "meta", in place of those whose packed weights are in a checkpoint's files.

    `how`: its `quantization_config`. Raises LorakitError for packed weights that fit no linear of the model.
    """
    found = _packed_tensors(files)
    if not found:
        raise LorakitError(
            f"the config says {how['quant_method']}, but no file has a packed weight (a tensor named '....qweight')\n"
            "  remove quantization_config from config.json if the weights are not quantized"
        )
    modules, prefix = dict(model.named_modules()), getattr(model, "base_model_prefix", "") + "."
    kind = KINDS[how["quant_method"]]
    for name, tensors in found.items():
        at = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        own = None if at is None else modules[at]
        was_conv1d = type(own).__name__ == "Conv1D"
        if at is None or own is None or not (isinstance(own, nn.Linear) or was_conv1d):
            raise LorakitError(
                f"the checkpoint has packed weights for '{name}', which is "
                f"{'no module' if own is None else f'a {type(own).__name__}'} of {type(model).__name__}\n"
                "  lorakit reads packed weights of linears; load it with the library that wrote it (gptqmodel)"
            )
        size_in, size_out = _sizes(own)
        try:
            linear = kind(tensors, settings_of(how, tensors, size_in), was_conv1d)
        except LorakitError as error:
            raise LorakitError(f"'{name}': {error}") from error
        if (linear.in_features, linear.out_features) != (size_in, size_out):
            raise LorakitError(
                f"'{name}' is packed with {linear.in_features} inputs and {linear.out_features} outputs; "
                f"{type(model).__name__} has {size_in} and {size_out}"
            )
        parent, _, last = at.rpartition(".")
        setattr(model.get_submodule(parent), last, linear.train(own.training))


def _sizes(own: Any) -> tuple[int, int]:
    return (own.in_features, own.out_features) if isinstance(own, nn.Linear) else (own.nx, own.nf)


def _packed_tensors(files: Sequence[str | Path]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the packed modules by their last names, on "meta": only the headers are read."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(key)
                    shapes[key] = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")
        except (SafetensorError, KeyError) as error:
            raise LorakitError(
                f"{path} is not a safetensors file that lorakit can read: {error}\n"
                "  convert the checkpoint to safetensors, as gptqmodel writes it"
            ) from error
    names = [key.removesuffix(".qweight") for key in shapes if key.endswith(".qweight")]
    lasts = ("qweight", "qzeros", "scales", "g_idx", "bias")
    found = {n: {last: shapes[f"{n}.{last}"] for last in lasts if f"{n}.{last}" in shapes} for n in names}
    for name, tensors in found.items():
        missing = [last for last in ("qzeros", "scales") if last not in tensors]
        if missing:
            raise LorakitError(f"'{name}' has a qweight, but no {listing(missing)}, in the checkpoint's files")
    return found


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
