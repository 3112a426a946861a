"""What methods whose result is an adapter do alike, behind the interface of `methods/method.py`.

A method's file imports these names, so that they are its own, and adds its settings and what it attaches.

A run may start from an earlier adapter: from its values and its saved modules, with a new optimizer. What an adapter is
(rank, targets, ...) comes from it then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...config import NONE, VIRTUAL, Choice, LoraConfig, RunSettings, Strict, VirtualTokenSettings, part, variants
from ...errors import AdapterError, ConfigError, listing
from ..method import Start, StartData

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...adapter.adapter import Adapter


class Earlier(Strict):
    adapter: str | None = Field(
        None,
        description="an adapter to start from (a folder, a file or a hub id), with a new optimizer; it decides rank, "
        "targets and the like",
    )


# Settings that an adapter does not fix: they act in training only.
_IN_TRAINING = {"dropout", "lora_plus", "freeze_a"}
# Settings that an adapter holds resolved to the modules of its base. Its recipe has them as the run gave them.
_RESOLVED = {
    "targets",
    "components",
    "exclude",
    "layers",
    "save_modules",
    "rank_pattern",
    "alpha_pattern",
    "init",
    "eva_rho",
    "init_batches",
    "trainable_tokens",
    *(name for name in VirtualTokenSettings.model_fields if name != "virtual_tokens"),
    "feedforward",
}

result = "adapter"
keeps_base = True


def start_from(config: RunSettings, fixes: Collection[str], kind: str | None = None) -> Start | None:
    """Read the adapter that a run starts from; None for a run that starts anew.

    `fixes`: the settings of `LoraConfig` that the method has; those that act in training only may be among them.
    `kind`: of all updates that an adapter of the method has, `NONE` for methods whose adapters have saved weights
    alone; None for any. Raises AdapterError for an adapter of another kind.
    """
    source = part(config, Earlier).adapter
    if source is None:
        return None
    from ...bases.rope import record_of
    from ...bases.vocabulary import recorded_tokens

    adapter = _load(source)
    if kind is not None:
        _check_kind(adapter, source, config.method, kind)
    fixed = {name: getattr(adapter.config, name) for name in fixes if name not in _IN_TRAINING}
    kinds = {update.variant for update in adapter.updates.values()}
    kinds -= {"tokens", *VIRTUAL} if len(kinds) > 1 else set()  # beside the others
    if "variant" in fixed and len(kinds) == 1 and kinds <= {*variants(), *VIRTUAL}:  # factors of experts are a LoRA's
        fixed["variant"] = kinds.pop()
    recipe = adapter.metadata.get("recipe")
    spellings = {}
    if isinstance(recipe, Mapping):  # lorakit's own run, which leaves out defaults
        # A start that was subtracted has twice the run's rank and alpha.
        for name in (_RESOLVED | ({"rank", "alpha"} if "init" in recipe else set())) & fixed.keys():
            default = LoraConfig.model_fields[name].get_default(call_default_factory=True)
            spellings[name] = recipe.get(name, default)
    if "prompt_encoder" in fixed and _is_bare_prefix(adapter):
        fixed |= {"prompt_encoder": "none", "encoder_size": None}
        spellings = {name: value for name, value in spellings.items() if name not in ("prompt_encoder", "encoder_size")}
    if added := recorded_tokens(adapter.metadata):
        fixed["add_tokens"] = sorted(added, key=lambda token: added[token])
    if scaling := record_of(adapter.metadata):
        fixed["rope_scaling"] = scaling
    about = adapter.metadata.get("data")
    own = adapter.config
    about = about if isinstance(about, Mapping) else {}
    return Start(source, fixed, spellings, own.task, own.base, own.revision, about, adapter.metadata)


def _is_bare_prefix(adapter: Adapter) -> bool:
    """Whether the adapter has a prefix without an encoder, as in PEFT's files also where its config says one."""
    from ...adapter.virtual_tokens import BODY, VirtualTokens

    own = adapter.updates.get(BODY)
    return isinstance(own, VirtualTokens) and own.kind == "prefix" and not own.encoder


def _check_kind(adapter: Adapter, source: str, method: str, kind: str) -> None:
    others = sorted({update.variant for update in adapter.updates.values()} - {kind})
    if others:
        what = "trains none" if kind == NONE else f"trains {kind} alone"
        raise AdapterError(
            f"{source}: it has updates of kind {listing(others)}, and method: {method} {what}\n"
            "  start from an adapter that this method trained, or use method: lora"
        )
    if kind != NONE and not adapter.updates:
        raise AdapterError(
            f"{source}: it has saved weights alone, and method: {method} trains updates of kind {kind}\n"
            "  start from an adapter that this method trained"
        )


def _load(source: str) -> Adapter:
    from ...adapter.adapter import Adapter

    adapter = Adapter.load(source)
    if adapter.embeddings:
        raise AdapterError(
            f"{source}: it has textual-inversion embeddings ({', '.join(list(adapter.embeddings)[:3])}), which this "
            "training cannot go on with"
        )
    return adapter


def precision(config: RunSettings, device: torch.device) -> Choice:
    from ...bases.device import choose_dtype

    return choose_dtype(config.precision, device)


def learning_rate(rate: float, why: str) -> tuple[float, str]:
    return rate, why


def attach_adapter(
    model: Any, fresh: LoraConfig, config: RunSettings, name: str, task_type: str, first: StartData | None
) -> None:
    """Attach a new adapter of this config, or the earlier one that the run starts from."""
    from ...adapter.fingerprint import ONLY_ON
    from ...bases.pipeline import as_module
    from ...bases.rope import RECORD
    from ...model.attach import attach, attach_from
    from ...model.known_base import base_fingerprint
    from ...model.start import Sources

    source = part(config, Earlier).adapter
    if source is None:
        sources = Sources(model) if first is None else Sources(model, first.batches, first.loss, None, first.ranks)
        attach_from(model, fresh, sources, name)
        return
    earlier = _load(source)
    in_training = {setting: getattr(config, setting) for setting in _IN_TRAINING}
    continued = earlier.config.replace(**in_training, task=task_type, base=config.model, revision=config.revision)
    known = earlier.metadata.get("fingerprint") or base_fingerprint(as_module(model), earlier.updates)
    metadata = {"fingerprint": known, "started_from": _lineage(earlier, source)}
    metadata |= {name: earlier.metadata[name] for name in (ONLY_ON, RECORD) if name in earlier.metadata}
    attach(model, replace(earlier, config=continued, metadata=metadata), name, trainable=True)


def check_result(model: Any, config: RunSettings, name: str, unsaved: Callable[[Any], str | None]) -> None:
    from ...model.capture import as_value

    why = unsaved(as_value(model, name))
    if why is not None:
        raise ConfigError(f"method: {config.method}: the result could not be saved\n  {why}")


def _lineage(adapter: Adapter, source: str) -> dict[str, Any]:
    """Describe the adapter that a run starts from, for the result's metadata: its name, a hash of its values, and its
    own data, metrics and lineage.
    """
    kept = {name: adapter.metadata[name] for name in ("data", "metrics", "started_from") if name in adapter.metadata}
    return {"adapter": Path(source).name, "sha256": adapter.digest(), **kept}


def rate_factors(model: Any, config: RunSettings, name: str) -> Mapping[nn.Parameter, tuple[str, float]]:
    return {}


def penalty(model: Any, name: str) -> Tensor | None:
    from ...bases.pipeline import as_module
    from ...model.training import penalties

    found = penalties(as_module(model), name)
    return sum(found[1:], start=found[0]) if found else None


def after_step(model: Any, name: str, step: int, steps: int) -> None:
    from ...model.training import after_step

    after_step(model, step, steps, name)


def activate(model: Any, name: str) -> None:
    from ...model.activate import activate

    activate(model, name)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    from ...model.activate import activate, active

    before = active(model)
    activate(model, None)
    try:
        yield
    finally:
        activate(model, before)


@contextmanager
def reloaded(model: Any, folder: Path) -> Iterator[None]:
    from ...adapter.adapter import Adapter
    from ...model.activate import activate, active
    from ...model.attach import attach
    from ...model.detach import detach

    before = active(model)
    attach(model, Adapter.load(folder), "reloaded", force=True)  # the base is the one it was trained on
    try:
        yield
    finally:
        detach(model, "reloaded")
        activate(model, before)


def save(
    model: Any,
    processor: Any,
    name: str,
    folder: Path,
    metadata: dict[str, Any],
    write: Callable[[Any, Path], None] | None = None,
) -> None:
    from ...model.capture import capture

    adapter = capture(model, name)
    adapter = replace(adapter, metadata={**adapter.metadata, **metadata})
    if write is None:
        adapter.save(folder)
    else:
        write(adapter, folder)


def note_together(config: RunSettings) -> str | None:
    return None


def alone(config: RunSettings) -> tuple[str, str] | None:
    for name, empty in (("save_modules", []), ("bias", "none")):
        value = getattr(config, name)
        if value != empty:
            return name, (
                f"{name}: {value}: a sweep does not train copies of base weights side by side in one forward pass yet\n"
                f"  omit {name}, or start these runs one by one with lorakit train"
            )
    return None


def cheaper() -> str | None:
    return None


def flags(model: str, result: str) -> str:
    return f"--model {quote(model)} --adapter {quote(result)}"
