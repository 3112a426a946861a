"""Match an adapter's modules to a model's; raise where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import differences
from ..adapter.update import Update
from ..config import LoraConfig, variants
from ..errors import AdapterError, TargetError, did_you_mean, listing
from ..layers.bases import quantized
from ..layers.targets import check_adaptable, check_packed, find_saved, module_names
from .state import architecture_of, base_parameters, base_weights, is_adapter_key


def modules_for(model: nn.Module, adapter: Adapter, strict: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules that the adapter changes, and those it names that the model lacks."""
    for m, update in adapter.updates.items():
        _check_live(m, update)
    names = module_names(model)
    found = {m: names[m] for m in adapter.updates if m in names}
    lost = [m for m in adapter.updates if m not in names]
    if lost and (strict or not found):
        raise TargetError(
            f"{len(lost)} of the adapter's {len(adapter.updates)} modules are not in this {type(model).__name__}: "
            f"{listing(lost, 3)}{did_you_mean(lost[0], names)}\n"
            "  is it an adapter for another model? strict=False attaches the rest and lists these"
        )
    check_adaptable(names, found)
    first: dict[int, str] = {}
    for m, module in found.items():
        parts = adapter.updates[m].parts
        if parts is not None:
            check_packed(m, module, len(parts))
        if first.setdefault(id(module), m) != m:
            raise TargetError(
                f"the adapter holds factors for '{first[id(module)]}' and '{m}', which are one module in this model"
            )
    return found, dict.fromkeys(lost, "no such module in this model")


def is_live(adapter: Adapter) -> bool:
    """Whether a live model takes all of its updates."""
    return all(u.variant in variants() for u in adapter.updates.values())


def _check_live(module: str, update: Update) -> None:
    if update.variant in variants():
        return
    if update.needs_base:
        raise AdapterError(
            f"'{module}' is a DoRA, which no live model takes yet\n"
            "  train without it, or use the adapter where it was made"
        )
    raise AdapterError(
        f"'{module}' has a {type(update).__name__} update, which no live model takes yet\n"
        "  adapter.resize(rank=...) makes low-rank factors of it, and says how near they are"
    )


def saved_for(model: nn.Module, adapter: Adapter, strict: bool, skipped: dict[str, str]) -> list[str]:
    if not adapter.saved:
        return []
    own = dict(base_parameters(model, every_name=True))
    lost = [n for n in adapter.saved if n not in own]
    buffers = [n for n in lost if n in dict(model.named_buffers())]
    if buffers and strict:
        raise TargetError(
            f"the adapter holds running values of the base ({listing(buffers, 3)}), which lorakit cannot switch\n"
            "  strict=False attaches the rest and leaves these as the base has them"
        )
    if lost and strict:
        raise TargetError(
            f"{len(lost)} weights that the adapter saved whole are not in this {type(model).__name__}: "
            f"{listing(lost, 3)}{did_you_mean(lost[0], own)}"
        )
    skipped |= dict.fromkeys(lost, "no such parameter in this model")
    packed = [m for m in quantized(model) if f"{m}.weight" in adapter.saved]
    if packed:
        raise AdapterError(
            f"the adapter saved the weight of '{packed[0]}' whole, and this base holds it quantized\n"
            "  attach it to the unquantized base, or load this one with that module left unquantized"
        )
    for n, value in adapter.saved.items():
        if n in own and own[n].shape != value.shape:
            raise AdapterError(
                f"saved weight '{n}' has shape {list(value.shape)}; the model's has {list(own[n].shape)}"
            )
    return [n for n in adapter.saved if n in own]


def fresh_saved(model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters that a fresh adapter trains whole, with their starting values: save_modules, and biases as asked."""
    values: dict[str, Tensor] = {}
    for name, module in find_saved(model, config).items():
        own = {f"{name}.{n}": p for n, p in base_parameters(module)}
        if not own:
            raise TargetError(f"'{name}' has no parameters to train (LoraConfig.save_modules)")
        if quantized(module):
            raise TargetError(
                f"'{name}' is quantized, and quantized weights cannot be trained (LoraConfig.save_modules)\n"
                "  load the base with that module left unquantized, or adapt it: LoraConfig.targets"
            )
        running = [n for n, _ in module.named_buffers() if n in module.state_dict() and not is_adapter_key(n)]
        if running:
            raise TargetError(
                f"'{name}' also keeps running values ({listing(running, 3)}), which an adapter cannot hold "
                "(LoraConfig.save_modules)\n"
                "  name the modules inside or beside it that have none"
            )
        values |= own
    if config.bias == "lora_only":
        values |= {f"{m}.bias": p for m, module in targets.items() for n, p in base_parameters(module) if n == "bias"}
    elif config.bias == "all":
        values |= {n: p for n, p in base_parameters(model) if n == "bias" or n.endswith(".bias")}
    if not values:
        return values
    # A weight that several modules share (tied embeddings) is trained for all of them.
    shared = {id(p) for p in values.values()}
    return values | {n: p for n, p in base_parameters(model) if id(p) in shared}


def check_base(model: nn.Module, adapter: Adapter, force: bool) -> None:
    expected = adapter.metadata.get("fingerprint")
    if expected and not force:
        if isinstance(expected, Mapping) and isinstance(expected.get("samples"), Mapping):
            # What the adapter replaces need not agree: a fresh classification head holds other values in each process.
            expected = {
                **expected,
                "samples": {n: row for n, row in expected["samples"].items() if n not in adapter.saved},
            }
        lines = differences(expected, base_weights(model), architecture_of(model))
        if lines:
            raise AdapterError(
                "the adapter was trained on another base:\n  "
                + "\n  ".join(lines)
                + (
                    "\n"
                    "  load that base, or attach(..., force=True) (--force-base, where a command has it) if you know "
                    "better"
                )
            )
