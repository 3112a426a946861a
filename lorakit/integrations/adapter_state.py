"""The adapter part of a checkpoint, from which training goes on bit for bit.

    adapter_config.json, adapter_model.safetensors, lorakit.json     the adapter in PEFT's format, usable at once
    lorakit_state.safetensors       tensors of the live adapter that these do not give back to the bit, if there are any

A LoRA, DoRA, LoHa or LoKr is in PEFT's file to the bit. A start that is subtracted (PiSSA) is not: the file has ΔW, and
training goes on from A, B and the frozen A₀, B₀.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..errors import AdapterError, listing
from ..io.atomic import replacing, write_errors
from ..io.tensors import read_tensors
from ..layers.layer import child_name
from ..model.capture import capture
from ..model.known_base import check_base
from ..model.naming import live_names, renamed
from ..model.state import saved_parameters, state_of
from .trained_adapter import updates_of

STATE_FILE = "lorakit_state.safetensors"


def save(model: nn.Module, name: str, folder: Path) -> None:
    """Write adapter `name` into a folder. Raises AdapterError if PEFT's format cannot hold it, and WriteError."""
    adapter = capture(model, name)
    base = getattr(model, "name_or_path", None)
    if adapter.config.base is None and base:
        adapter = replace(adapter, config=adapter.config.replace(base=base))
    adapter.save(folder)
    # By reading the file again: it alone says what it gives back.
    held = _held(model, name, renamed(Adapter.load(folder), live_names(model, adapter)))
    rest = {key: tensor for key, tensor in _live(model, name).items() if not _same(tensor, held.get(key))}
    _write_rest(folder / STATE_FILE, rest)


def restore(model: nn.Module, name: str, folder: Path) -> None:
    """Copy a checkpoint's values into the attached adapter `name`, in place.

    Raises AdapterError, before anything is changed, if the folder holds no adapter, or one of other modules, shapes,
    scales or base.
    """
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder} holds no adapter (no adapter_config.json)\n"
            "  expected a checkpoint that a trainer of lorakit.integrations.adapter_trainer wrote"
        )
    adapter = Adapter.load(folder)
    live = live_names(model, adapter)
    check_base(model, adapter, False, live)
    adapter = renamed(adapter, live)
    _check_same(model, name, adapter, folder)
    values: dict[str, Tensor] = dict(_held(model, name, adapter))
    if (folder / STATE_FILE).exists():
        values |= read_tensors(folder / STATE_FILE)[0]
    own = _live(model, name)
    missing = [key for key in own if key not in values]
    misfits = [key for key in own if key in values and values[key].shape != own[key].shape]
    if missing or misfits:
        raise AdapterError(
            f"{folder} does not fit adapter '{name}': "
            + (f"it lacks {listing(missing, 3)}" if missing else "")
            + ("; " if missing and misfits else "")
            + "; ".join(f"{k} is {list(values[k].shape)} there, {list(own[k].shape)} here" for k in misfits[:3])
            + "\n  attach the adapter with the config that the checkpoint was trained with"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(values[key])


def _live(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return all tensors of an attached adapter: its updates' parameters and persistent buffers, as
    `<module>.<child>.<tensor>`, and its saved parameters under the base's names.
    """
    tensors: dict[str, Tensor] = {}
    for module, update in updates_of(model, name).items():
        tensors |= update.state_dict(prefix=f"{module}.{child_name(name)}.", keep_vars=True)
    return tensors | dict(saved_parameters(model, state_of(model), name))


def _held(model: nn.Module, name: str, adapter: Adapter) -> Mapping[str, Tensor]:
    """Return an adapter's tensors by the names of `_live`, as far as they have one: "inner.A" of a DoRA is its "A"."""
    found: dict[str, Tensor] = {}
    for module, update in updates_of(model, name).items():
        value = adapter.updates.get(module)
        own = value.tensors() if value is not None else {}
        for key in update.state_dict():
            if key.rpartition(".")[2] in own:
                found[f"{module}.{child_name(name)}.{key}"] = own[key.rpartition(".")[2]]
    return found | dict(adapter.saved)


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.detach().cpu(), b.cpu())


def _write_rest(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    if tensors:
        with replacing(path) as temporary:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary)
    else:
        with write_errors(path):
            path.unlink(missing_ok=True)  # of an earlier save into this folder


def _check_same(model: nn.Module, name: str, adapter: Adapter, folder: Path) -> None:
    """Raise AdapterError if the checkpoint's adapter has other modules or scales than the attached one."""
    attached = state_of(model).adapters[name]
    own = {*updates_of(model, name), *attached.saved}
    tied = set(attached.modules) - own
    theirs = {*adapter.updates, *adapter.saved} - tied
    differing = sorted(own ^ theirs)
    fix = "  attach the adapter with the config that the checkpoint was trained with"
    if differing:
        where = "the checkpoint" if differing[0] in theirs else "the attached adapter"
        raise AdapterError(
            f"{folder} holds another adapter than '{name}': only {where} has '{differing[0]}'"
            f"{f' (and {len(differing) - 1} more differ)' if len(differing) > 1 else ''}\n{fix}"
        )
    here = capture(model, name)
    for module, update in renamed(here, live_names(model, here)).updates.items():
        a, b = (getattr(u, "scale", None) for u in (update, adapter.updates[module]))
        if isinstance(a, float | int) and isinstance(b, float | int) and not math.isclose(a, b, rel_tol=1e-6):
            raise AdapterError(
                f"{folder}: the scale (alpha / rank) of '{module}' is {b:g} there, and {a:g} in '{name}'\n{fix}"
            )
