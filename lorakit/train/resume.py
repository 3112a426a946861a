"""Write and read the checkpoints from which a run resumes, bit for bit: parameters, optimizer state and position.

    checkpoints/step-120/trainable.safetensors   the trained parameters by their names in the model
                         optimizer.safetensors   the optimizer's state, `<parameter>.exp_avg`, ...
                         best.safetensors        the parameters at the best held-out loss, if there is one
                         ema.safetensors         their moving averages, if the run has them
                         buffers.safetensors     other state of the updates, if they have some (see `buffers`)
                         state.json              step, early stopping, training time
                         adapter_config.json ... the adapter as it is at this step, as in PEFT's folder

A folder is written under a temporary name, synced and renamed, so an existing one is complete. No random state is
stored: batches and dropout are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, LorakitWarning, TrainError
from ..io.atomic import sync_folder, write_errors
from ..io.json_object import read_json
from ..io.tensors import read_shapes, read_tensors
from ..layers.layer import child_name
from ..layers.updates.update import LiveUpdate
from ..model.attach import DEFAULT
from .optimizer import put_state, state_of

PREFIX, TEMPORARY = "step-", ".writing-"


@dataclass
class Loaded:
    """A checkpoint's contents. `parameters`, `best`, `ema`: by parameter; `optimizer`: by `<parameter>.<state>`;
    `buffers`: by buffer.
    """

    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]
    state: dict[str, Any]
    ema: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def trainable(model: nn.Module, adapter: str = DEFAULT) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name; in a sweep, those of one adapter.

    They are named as if the adapter were the only one, so a run of a sweep has the same checkpoints as one alone.
    """
    return _of_adapter({name: p for name, p in model.named_parameters() if p.requires_grad}, adapter)


def buffers(model: nn.Module, adapter: str = DEFAULT) -> dict[str, Tensor]:
    """Return what an adapter's updates hold besides their trained parameters, by name, named as in `trainable`.

    These are persistent buffers (a frozen start, AdaLoRA's importances) and parameters that are not trained (LoRA-FA's
    A). Buffers registered with `persistent=False` are computed again when the adapter is attached.
    """
    found: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, LiveUpdate):
            held = module.state_dict(prefix=f"{module_name}.", keep_vars=True)
            found |= {name: t for name, t in held.items() if not t.requires_grad}
    return _of_adapter(found, adapter)


_T = TypeVar("_T", bound=Tensor)


def _of_adapter(tensors: dict[str, _T], adapter: str) -> dict[str, _T]:
    if adapter == DEFAULT:
        return tensors
    own, alone = f".{child_name(adapter)}.", f".{child_name(DEFAULT)}."
    return {name.replace(own, alone): t for name, t in tensors.items() if own in name}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    adapter: str = DEFAULT,
    result: Callable[[Path], None] | None = None,
    good: int | None = None,
    ema: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-N`, then delete old ones (see `prune`). Returns its path.

    `result`: writes the adapter as it is now into a folder, so that the checkpoint can be used like one. Raises
    WriteError if it cannot be written; the older ones are still there then.
    """
    parameters, held = trainable(model, adapter), buffers(model, adapter)
    others = {"best": best, "ema": ema or {}, "buffers": held}
    state = {"step": step, **state, **({"buffers": True} if held else {})}
    final = folder / f"{PREFIX}{step}"
    with write_errors(final):
        _write(folder, final, parameters, optimizer, others, state, result)
        prune(folder, keep, good)
    return final


def _write(
    folder: Path,
    final: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    result: Callable[[Path], None] | None,
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{secrets.token_hex(4)}"
    old = folder / f"{TEMPORARY}old"
    try:
        temporary.mkdir()
        if result is not None:
            with warnings.catch_warnings():  # what PEFT would not load is said once, of the run's result
                warnings.simplefilter("ignore", LorakitWarning)
                result(temporary / "result")
            for file in (temporary / "result").iterdir():
                file.rename(temporary / file.name)
            (temporary / "result").rmdir()
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in parameters.items()}, temporary / "trainable.safetensors"
        )
        save_file(_optimizer_tensors(parameters, optimizer), temporary / "optimizer.safetensors")
        for name, tensors in others.items():
            if tensors:
                on_cpu = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
                save_file(on_cpu, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf8")
        for written in temporary.rglob("*"):
            if written.is_dir():
                sync_folder(written)
                continue
            with written.open("rb+") as handle:
                os.fsync(handle.fileno())
        sync_folder(temporary)
        if final.exists():
            final.rename(old)
        try:
            temporary.rename(final)
        except BaseException:
            if old.exists():
                old.rename(final)
            raise
        sync_folder(folder)
    finally:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, if one of that step exists (step 0 needs none)."""
    steps = steps_in(folder)
    if step == 0 or step in steps:
        for later in (s for s in steps if s > step):
            shutil.rmtree(folder / f"{PREFIX}{later}")


def prune(folder: Path, keep: int, good: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, and the newest one up to step `good`.

    `good`: the last step at which the run was known not to have diverged.
    """
    steps = steps_in(folder)
    kept = {*steps[-keep:], *[step for step in steps if good is not None and step <= good][-1:]}
    for old in steps:
        if old not in kept:
            shutil.rmtree(folder / f"{PREFIX}{old}")


def steps_in(folder: Path) -> list[int]:
    """List the steps of a folder's checkpoints in ascending order; empty if there is no folder."""
    if not folder.is_dir():
        return []
    names = (p.name.removeprefix(PREFIX) for p in folder.iterdir() if p.name.startswith(PREFIX))
    return sorted(int(n) for n in names if n.isdigit())


def newest_state(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint's state.json; empty if there is no checkpoint."""
    steps = steps_in(folder)
    if not steps:
        return {}
    state: dict[str, Any] = json.loads((folder / f"{PREFIX}{steps[-1]}" / "state.json").read_text(encoding="utf8"))
    return state


def newest_ranks(folder: Path) -> dict[str, int] | None:
    """Return the rows of each factor A in the newest checkpoint, by module; None if there is none that can be read."""
    for step in reversed(steps_in(folder)):
        try:
            at = folder / f"{PREFIX}{step}"
            shapes = read_shapes(at / "trainable.safetensors")
            if (at / "buffers.safetensors").exists():  # LoRA-FA's A
                shapes = shapes | read_shapes(at / "buffers.safetensors")
        except AdapterError:
            continue  # `load_newest` says so
        ranks: dict[str, dict[str, int]] = {"A": {}, "B": {}}
        for name, shape in shapes.items():
            module, _, own = name.rpartition(f".{child_name(DEFAULT)}.")
            ranks.setdefault(own.rpartition(".")[2], {})[module] = shape[0]  # "A", or "inner.A" of a DoRA
        return ranks["A"] if ranks["A"] and ranks["A"].keys() == ranks["B"].keys() else None
    return None


def load_newest(folder: Path, damaged: Callable[[str], None] = lambda note: None) -> Loaded | None:
    """Read the newest checkpoint that can be read; None if there is none. Deletes what interrupted writes left behind.

    `damaged`: called for each newer one that cannot be read, which is then renamed to `damaged-step-N`. Raises
    TrainError if there are checkpoints and none can be read.
    """
    if folder.is_dir():
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another process of this run may be deleting it too
    broken = []
    for step in reversed(steps_in(folder)):
        at = folder / f"{PREFIX}{step}"
        try:
            loaded = read(at)
        except TrainError as error:
            broken.append((at, str(error)))
            continue
        for other, why in broken:
            aside = _set_aside(other)
            damaged(f"the checkpoint is damaged: {why}; kept as {aside.name}, resuming from {at.name}")
        return loaded
    if broken:
        lines = "".join(f"\n  {why}" for _, why in broken)
        raise TrainError(
            f"no checkpoint of {folder} can be read:{lines}\n  delete {folder} to start the run over, or give another "
            "folder (--out)"
        )
    return None


def read(at: Path) -> Loaded:
    """Read one checkpoint. Raises TrainError, naming the file, if any of it is missing or damaged."""
    try:
        state = read_json(at / "state.json")
        best = at / "best.safetensors"
        # best.safetensors exists from the first evaluation on held-out rows on.
        evaluated = (state.get("early_stop") or {}).get("best_loss") is not None
        has_best = best.exists() or state.get("best", evaluated)
        if state.get("step") != int(at.name.removeprefix(PREFIX)):
            raise TrainError(f"{at / 'state.json'} is not of this step: it says {state.get('step')}")
        return Loaded(
            read_tensors(at / "trainable.safetensors")[0],
            read_tensors(at / "optimizer.safetensors")[0],
            read_tensors(best)[0] if has_best else {},
            state,
            read_tensors(at / "ema.safetensors")[0] if state.get("ema") else {},
            read_tensors(at / "buffers.safetensors")[0] if state.get("buffers") else {},
        )
    except AdapterError as error:
        raise TrainError(str(error).splitlines()[0]) from error


def _set_aside(at: Path) -> Path:
    """Rename a damaged checkpoint, so that it does not count among those to keep."""
    to = at.with_name(f"damaged-{at.name}")
    with contextlib.suppress(FileNotFoundError):  # another process of this run was faster
        if to.exists():
            shutil.rmtree(to)
        at.rename(to)
    return to


def restore(loaded: Loaded, model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str = DEFAULT) -> None:
    """Load a checkpoint into the model and the optimizer. Raises TrainError if it has other parameters."""
    parameters = trainable(model, adapter)
    put(loaded.parameters, parameters)
    put(loaded.buffers, buffers(model, adapter), "buffers")
    for name, parameter in parameters.items():
        state = {
            key.rpartition(".")[2]: value for key, value in loaded.optimizer.items() if key.rpartition(".")[0] == name
        }
        put_state(optimizer, parameter, state)


def put(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str = "parameters") -> None:
    """Copy values into the parameters (or `what` they are) of the same names. Raises TrainError if the names differ."""
    if values.keys() != parameters.keys():
        name = sorted(values.keys() ^ parameters.keys())[0]
        raise TrainError(
            f"the checkpoint's {what} differ from those trained now: '{name}' is only in one of them\n"
            "  give another folder (--out) to start over"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors |= {f"{name}.{key}": value for key, value in state_of(optimizer, parameter).items()}
    return tensors
