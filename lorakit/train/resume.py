"""Checkpoints that a run can be taken up from to the bit: trained parameters, optimizer state, position. Safetensors
and JSON.

    checkpoints/step-120/trainable.safetensors   the trained parameters by their names in the model
                         optimizer.safetensors   AdamW's averages, `<parameter>.exp_avg`, ...
                         best.safetensors        the parameters at the best held-out loss, where there is one
                         state.json              step, early stopping, time spent

A folder is written under a temporary name, synced and renamed, so one that exists is whole. No random state is stored:
batches and dropout are functions of (seed, step).
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
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]
    state: dict[str, Any]


def trainable(model: nn.Module, adapter: str = DEFAULT) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; of several adapters the named one's, by the names it would have if it
    were alone.

    So a run that was trained among others has the checkpoints of one that was not.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if adapter == DEFAULT:
        return found
    own, alone = f".{child_name(adapter)}.", f".{child_name(DEFAULT)}."
    return {name.replace(own, alone): p for name, p in found.items() if own in name}


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
    """Write `folder/step-N` and remove all but the newest `keep`."""
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
    """Remove those of later steps, if there is one of this step (0: the beginning, which needs none)."""
    steps = found(folder)
    if step == 0 or step in steps:
        for later in (s for s in steps if s > step):
            shutil.rmtree(folder / f"{PREFIX}{later}")


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for old in found(folder)[:-keep]:
        shutil.rmtree(folder / f"{PREFIX}{old}")


def found(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    names = (p.name.removeprefix(PREFIX) for p in folder.iterdir() if p.name.startswith(PREFIX))
    return sorted(int(n) for n in names if n.isdigit())


def load_newest(folder: Path) -> Loaded | None:
    """The newest checkpoint, or None. Leftovers of a write that was killed are removed."""
    if folder.is_dir():
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another process of this run may be at it too
    steps = found(folder)
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
    """Put a checkpoint's parameters and optimizer state back. TrainError if they are not those that train now."""
    parameters = trainable(model, adapter)
    put(loaded.parameters, parameters)
    for name, parameter in parameters.items():
        state = {
            key.rpartition(".")[2]: value for key, value in loaded.optimizer.items() if key.rpartition(".")[0] == name
        }
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy values into the parameters of the same names."""
    if values.keys() != parameters.keys():
        odd = sorted(values.keys() ^ parameters.keys())[0]
        raise TrainError(f"the checkpoint does not hold the parameters that train now: they differ at '{odd}'")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous().clone()
    return tensors
