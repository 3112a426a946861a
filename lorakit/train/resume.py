"""Write and read the checkpoints from which a run resumes, bit for bit: parameters, optimizer state and position.

    checkpoints/step-120/trainable.safetensors   the trained parameters by their names in the model
                         optimizer.safetensors   AdamW's averages, `<parameter>.exp_avg`, ...
                         best.safetensors        the parameters at the best held-out loss, if there is one
                         state.json              step, early stopping, training time

A folder is written under a temporary name, synced and renamed, so an existing one is complete. No random state is
stored: batches and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..io.atomic import sync_folder
from ..io.tensors import read_tensors
from ..layers.layer import child_name
from ..model.attach import DEFAULT

PREFIX, TEMPORARY = "step-", ".writing-"


@dataclass
class Loaded:
    """A checkpoint's contents. `parameters` and `best` by parameter name; `optimizer` by `<parameter>.<state>`."""

    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]
    state: dict[str, Any]


def trainable(model: nn.Module, adapter: str = DEFAULT) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name; in a sweep, those of one adapter.

    They are named as if the adapter were the only one, so a run of a sweep has the same checkpoints as one alone.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if adapter == DEFAULT:
        return parameters
    own, alone = f".{child_name(adapter)}.", f".{child_name(DEFAULT)}."
    return {name.replace(own, alone): p for name, p in parameters.items() if own in name}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    adapter: str = DEFAULT,
) -> Path:
    """Write `folder/step-N`, then delete all but the newest `keep` checkpoints. Returns its path."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parameters = trainable(model, adapter)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in parameters.items()}, temporary / "trainable.safetensors"
        )
        save_file(_optimizer_tensors(parameters, optimizer), temporary / "optimizer.safetensors")
        if best:
            save_file({n: t.contiguous() for n, t in best.items()}, temporary / "best.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf8")
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        sync_folder(temporary)
        final = folder / f"{PREFIX}{step}"
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return final


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, if one of that step exists (step 0 needs none)."""
    steps = steps_in(folder)
    if step == 0 or step in steps:
        for later in (s for s in steps if s > step):
            shutil.rmtree(folder / f"{PREFIX}{later}")


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in steps_in(folder)[:-keep]:
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


def load_newest(folder: Path) -> Loaded | None:
    """Read the newest checkpoint; None if there is none. Deletes what interrupted writes left behind."""
    if folder.is_dir():
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another process of this run may be deleting it too
    steps = steps_in(folder)
    if not steps:
        return None
    at = folder / f"{PREFIX}{steps[-1]}"
    best = at / "best.safetensors"
    return Loaded(
        read_tensors(at / "trainable.safetensors")[0],
        read_tensors(at / "optimizer.safetensors")[0],
        read_tensors(best)[0] if best.exists() else {},
        json.loads((at / "state.json").read_text(encoding="utf8")),
    )


def restore(loaded: Loaded, model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str = DEFAULT) -> None:
    """Load a checkpoint into the model and the optimizer. Raises TrainError if it has other parameters."""
    parameters = trainable(model, adapter)
    put(loaded.parameters, parameters)
    for name, parameter in parameters.items():
        state = {
            key.rpartition(".")[2]: value for key, value in loaded.optimizer.items() if key.rpartition(".")[0] == name
        }
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy values into the parameters of the same names. Raises TrainError if the names differ."""
    if values.keys() != parameters.keys():
        name = sorted(values.keys() ^ parameters.keys())[0]
        raise TrainError(
            f"the checkpoint's parameters differ from those trained now: '{name}' is only in one of them\n"
            "  give another folder (--out) to start over"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous().clone()
    return tensors
