"""Quantize a base's linear weights while it is loaded, and read how a checkpoint is quantized already.

Quantized is the weight of each linear (`nn.Linear`, transformers' `Conv1D`). These stay in the base's own precision:

- The output layer, the heads of classifiers, and weights that are tied to an embedding: they are small next to the
  rest, they decide a token or a label, and their rounding would show in every logit.
- Linears that a model's class in transformers wants in float32 where the rest is fp16 (T5's `wo`): transformers
  quantizes none of them.
- For nf4 and fp4, linears whose in_features are no multiple of 64. bitsandbytes' kernel for CPUs with AVX512 takes the
  scale of the wrong block if a row is not whole blocks: with 96 inputs and standard normal weights, values were off by
  up to 1.4 where rounding is off by 0.4 (bitsandbytes 0.50.2).
- What is no linear: norms, biases, embeddings, experts held as 3-D parameters.

Norms stay as given too, where other trainers convert them to float32: a model's norms compute in float32 in any case,
a float32 weight would make the hidden states float32 and so double the activations, and the adapter would be trained
on another model than the one it is used with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..config import Quantization
from ..config.quantization import FOUR_BITS
from ..errors import ConfigError, LorakitError, LorakitWarning, did_you_mean, listing
from .device import choose_dtype
from .stored_weights import METHODS, Storage, storage_of

if TYPE_CHECKING:
    import torch
    from torch import nn

HEADS = ("score", "classifier", "qa_outputs")  # what transformers calls the heads that a task trains
BLOCK = 64  # weights that share a scale in nf4 and fp4
_BITSANDBYTES = ("bitsandbytes", "pip install 'lorakit[quant]'")
_TORCHAO = ("torchao", "pip install 'lorakit[quant]'")
# quantizer -> its package, and how to install it
PACKAGES = {**dict.fromkeys(("nf4", "fp4", "int8"), _BITSANDBYTES), "torchao-int8": _TORCHAO}
KERNEL = "gptqmodel"  # whose linears read GPTQ and AWQ too
# the method that a checkpoint records -> the same; GPTQ and AWQ need none
READERS = {
    "bitsandbytes": _BITSANDBYTES,
    "torchao": _TORCHAO,
    "hqq": ("hqq", "pip install hqq"),
    "quanto": ("optimum.quanto", "pip install optimum-quanto"),
    "compressed-tensors": ("compressed_tensors", "pip install compressed-tensors"),
}


@dataclass(frozen=True)
class Linears:
    """A model's linears by name: those to quantize, and those that stay as they are, with the reason."""

    quantized: dict[str, nn.Module] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()  # of those kept, the ones whose sizes the quantizer cannot take


def linears_of(model: nn.Module, quantizer: str, trained: Sequence[str] = ()) -> Linears:
    """Sort a model's linears by whether `quantizer` quantizes them. The model may be on the meta device.

    `trained`: names of modules that are trained and saved in full, which stay as they are.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    float32: set[str] = set()
    for setting in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        float32 |= set(getattr(model, setting, None) or ())
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found, odd = Linears(), []
    for name, module in model.named_modules():
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        last = name.rpartition(".")[2]
        inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        if module is head or id(module.weight) in embedded:
            found.kept[name] = "the output layer"
        elif any(part in HEADS for part in name.split(".")):
            found.kept[name] = "a head"
        elif any(last == each or f".{name}".endswith(f".{each}") for each in trained):
            found.kept[name] = "trained and saved in full"
        elif any(f".{each}." in f".{name}.weight." for each in float32):
            found.kept[name] = "transformers does not quantize it"
        elif quantizer in FOUR_BITS and inputs % BLOCK:
            found.kept[name] = f"{inputs} inputs are not whole blocks of {BLOCK}"
            odd.append(name)
        else:
            found.quantized[name] = module
    return Linears(found.quantized, found.kept, tuple(odd))


def stored_linears(model: nn.Module, storage: Storage, trained: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the linears whose weights a base stores in this way, by name, in its model without quantized weights.

    `trained`: as for `linears_of`.
    """
    from torch import nn

    sizes_matter = storage.quantizer if storage.unquantized is None and storage.new else None
    linears = linears_of(model, sizes_matter or "int8", trained if storage.new else ()).quantized
    if storage.in_blocks:
        blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
        linears = {name: module for name, module in linears.items() if name.startswith(blocks)}
    kept = [each.removesuffix(".weight") for each in storage.unquantized or ()]
    return {
        name: module
        for name, module in linears.items()
        if not any(f".{name}".endswith(f".{each}") or name.startswith(f"{each}.") for each in kept)
    }


def loading_options(
    how: Quantization,
    name: str,
    config: Any,
    skeleton: Callable[[], nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    trained: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the arguments of transformers' `from_pretrained` that quantize a base; {} where nothing is to be.

    `name`: the base's, for messages; `config`: its transformers config; `skeleton`: builds it without weights (on the
    meta device, where this is called); `trained`: as for `linears_of`. Warns about linears that stay as they are
    because of their sizes. Raises ConfigError for a base that is quantized already, or has no linear to quantize;
    LorakitError if the quantizer's package is missing.
    """
    already = storage_of(config)
    if how.quantize is None:
        if already is not None:
            _check_reader(name, already)
        return {}
    import torch

    check_package(how.quantize)
    if already is not None:
        raise ConfigError(
            f"{name} is quantized already: {already.title}\n"
            f"  omit quantize: {how.quantize}, or give the unquantized base"
        )
    with torch.device("meta"):
        linears = linears_of(skeleton(), how.quantize, trained)
    if not linears.quantized:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(linears.kept.items())[:3])
        raise ConfigError(
            f"{name} has no linear that can be quantized to {how.quantize}{f' ({reasons})' if reasons else ''}\n"
            f"  omit quantize: {how.quantize}, or choose another"
        )
    if linears.odd:
        first = linears.odd[0]
        warnings.warn(
            f"{len(linears.odd)} of {len(linears.odd) + len(linears.quantized)} linears stay in {dtype}, as "
            f"{how.quantize} takes whole blocks of {BLOCK} inputs: {listing(linears.odd, 3)} ({linears.kept[first]})",
            LorakitWarning,
            stacklevel=3,
        )
    return {"quantization_config": _config(how, list(linears.kept), dtype, device), "device_map": {"": device}}


def check_package(quantizer: str) -> None:
    """Raise LorakitError, with the command that installs it, if a quantizer's package is missing."""
    package, install = PACKAGES[quantizer]
    if not is_installed(package):
        raise LorakitError(f"quantize: {quantizer} needs {package}, which is not installed\n  {install}")


def check_kernel(kernel: str, name: str, packed: bool) -> None:
    """Raise ConfigError for an unknown kernel, or one for a base that is no GPTQ or AWQ checkpoint; LorakitError if its
    package is missing. `name`: the base's; `packed`: whether it is such a checkpoint.
    """
    if kernel != KERNEL:
        raise ConfigError(f"there is no kernel '{kernel}'\n  expected None for lorakit's own linears, or '{KERNEL}'")
    if not packed:
        raise ConfigError(f"kernel: {kernel} is for GPTQ and AWQ checkpoints, and {name} is none\n  omit kernel")
    if not is_installed(KERNEL):
        raise LorakitError(f"kernel: {kernel} is not installed\n  pip install gptqmodel optimum, or omit kernel")


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    parent = package.rpartition(".")[0]
    return (not parent or find_spec(parent) is not None) and find_spec(package) is not None


def _check_reader(name: str, storage: Storage) -> None:
    """Raise LorakitError for a way of quantizing that nothing reads, and if the package that it needs is missing."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {*METHODS, *AUTO_QUANTIZATION_CONFIG_MAPPING}
    if storage.method not in known:  # transformers would load it as if it were not quantized
        alike = did_you_mean(storage.method.lower(), known)
        raise LorakitError(
            f"{name} cannot be read: its config.json says quant_method '{storage.method}', which neither lorakit nor "
            f"transformers knows{alike}\n  expected one of {', '.join(sorted(METHODS))}"
        )
    package, install = READERS.get(storage.method, ("", ""))
    if package and not is_installed(package):
        raise LorakitError(f"{name} is quantized: {storage.title}, and {package} is not installed\n  {install}")


def compute_dtype(how: Quantization, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a 4-bit weight is multiplied. `dtype`: the base's."""
    return dtype if how.compute_dtype == "auto" else choose_dtype(how.compute_dtype, device).value


def _config(how: Quantization, kept: list[str], dtype: torch.dtype, device: torch.device) -> Any:
    """Build transformers' quantization config. `kept`: the names of linears that stay as they are."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if how.quantize == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # Inductor's settings are the process's; only torch.compile of torchao's own tensors wants them changed.
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=kept)
    if how.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.quantize,
        bnb_4bit_use_double_quant=how.double,
        bnb_4bit_compute_dtype=compute_dtype(how, dtype, device),
        llm_int8_skip_modules=kept,
    )
