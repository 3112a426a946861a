"""The quantized weights of a checkpoint: which modules have one, in which format, by its config and its files.

Each is put in the place of an ordinary weight, "<module>.weight", so that the rest of a merge sees a checkpoint without
quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ...errors import LorakitError, did_you_mean, listing
from ...io.stream import Slot
from ..conv1d import is_conv1d
from .format import Format
from .weight import PackedSlot, QuantizedTensors, packed_slot, read_all

_OTHER_FILES = {"format", "found", "weight"}
# A smaller tensor is read when the checkpoint is opened: it may hold settings of its module.
_SMALL = 4096
# Where a `quantization_config` lists the modules that are not quantized.
UNQUANTIZED = ("llm_int8_skip_modules", "modules_to_not_convert")
# Copies of the quantization's settings that older programs look for.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint is quantized. `config`: its `quantization_config`; `inner`: whether that is in `text_config`."""

    format: Format
    settings: Any
    config: Mapping[str, Any]
    inner: bool = False

    @property
    def kind(self) -> str:
        """Its name in `--requantize`."""
        return self.format.kind(self.settings)


def formats() -> tuple[Format, ...]:
    """Return the formats of all files."""
    return _formats()


def kinds() -> list[str]:
    """Return the names of all kinds."""
    return [kind for format in _formats() for kind in format.kinds]


def format_for(kind: str) -> Format:
    """Return the format that has this kind. Raises LorakitError if none has."""
    for format in _formats():
        if kind in format.kinds:
            return format
    raise LorakitError(
        f"'{kind}' is no kind of quantized weights{did_you_mean(kind, kinds())}\n"
        f"  expected {', '.join(kinds())}, or same: as the base has it"
    )


def quantization_of(folder: object, config: Mapping[str, Any]) -> StoredQuantization | None:
    """Read a model's config; None if it is not quantized. Raises LorakitError for a format that cannot be read."""
    for part, inner in ((config, False), (config.get("text_config"), True)):
        how = part.get("quantization_config") if isinstance(part, Mapping) else None
        if not how:
            continue
        method = how.get("quant_method", "quantized") if isinstance(how, Mapping) else how
        for format in _formats() if isinstance(how, Mapping) else ():
            try:
                settings = format.settings(how)
            except LorakitError as error:
                raise LorakitError(f"{folder} is quantized ({method}) and cannot be read: {error}") from error
            if settings is not None:
                return StoredQuantization(format, settings, how, inner)
        raise LorakitError(
            f"{folder} is quantized ({method}) in a format that cannot be merged; expected bitsandbytes (4 or 8 bits), "
            "gptq or awq\n"
            "  merge into the unquantized base: give its folder as BASE"
        )
    return None


def with_weights(
    folder: object, tensors: Mapping[str, Slot], quantization: StoredQuantization, model_type: str
) -> dict[str, Slot]:
    """Return the checkpoint's tensors with a weight in place of each module's packed tensors.

    Raises LorakitError for packed tensors that do not fit together, or if there are none.
    """
    format = quantization.format
    marker = f".{format.marker}"
    modules = [name.removesuffix(marker) for name in tensors if name.endswith(marker)]
    if not modules:
        raise LorakitError(
            f"{folder} says that it is quantized ({quantization.kind}), but none of its tensors is: no '...{marker}'\n"
            f"  it has {listing(tensors, 3)}; if its weights are not quantized, take quantization_config out of its "
            "config.json"
        )
    own = {module: _own(module, tensors, format) for module in modules}
    packed = {f"{module}.{name}" for module, slots in own.items() for name in slots}
    made: dict[str, Slot] = {}
    mains = {f"{module}.{format.main}": module for module in modules}
    for name, slot in tensors.items():
        if name in mains:
            made[f"{mains[name]}.weight"] = _weight(mains[name], own[mains[name]], quantization, model_type, folder)
        elif name not in packed:
            made[name] = slot
    return made


def _own(module: str, tensors: Mapping[str, Slot], format: Format) -> dict[str, Slot]:
    """Return a module's packed tensors by their own names."""
    start = f"{module}."
    known = tuple(f"{start}{name}" for name in format.names)
    return {name.removeprefix(start): slot for name, slot in tensors.items() if name.startswith(known)}


def _weight(
    module: str, slots: Mapping[str, Slot], quantization: StoredQuantization, model_type: str, folder: object
) -> PackedSlot:
    format = quantization.format
    small = {name: slot for name, slot in slots.items() if slot.nbytes <= _SMALL}
    try:
        shapes = {name: (slot.dtype, slot.shape) for name, slot in slots.items()}
        settings, shape = format.of_module(shapes, read_all(small), quantization.settings)
    except (LorakitError, KeyError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise LorakitError(
            f"{folder}: '{module}' is not a sound {quantization.kind} weight: {why}\n  fetch the checkpoint again"
        ) from error
    packed = QuantizedTensors(format, settings, shape, partial(read_all, slots), slots)
    return packed_slot(packed, slots[format.main], is_conv1d(module, model_type))


@cache
def _formats() -> tuple[Format, ...]:
    package = __name__.rpartition(".")[0]
    path = import_module(package).__path__
    names = sorted({file.name for file in iter_modules(path)} - _OTHER_FILES)
    return tuple(import_module(f".{name}", package).FORMAT for name in names)
