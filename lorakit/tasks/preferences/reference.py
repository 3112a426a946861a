"""What the model gave to the answers before training: the reference of DPO, IPO and KTO.

That is the base alone for a run that starts anew, and the earlier adapter as it was for one that starts from an adapter
(`adapter`). It is computed once, before the first step, which costs one forward pass over the data instead of one more
in every step. So training has no second model and no second adapter, and with method: full, which keeps no base, it is
the same. The run's folder keeps it in `reference.safetensors`, from which a resumed run reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...data.preference_items import PreferenceItem
from ...errors import AdapterError, TrainError
from ...io.tensors import read_tensors, write_tensors
from ...methods import method_of
from ...model.activate import adapters
from ..task import Base
from .scores import log_probabilities

FILE = "reference.safetensors"
KEY = 16  # bytes

# A model's references, by the adapter that runs start from (None: the base alone), so that the runs of a sweep share
# them: item -> log π of its answers and, for a single answer, of the mismatched row.
_known: WeakKeyDictionary[nn.Module, dict[str | None, dict[bytes, tuple[float, ...]]]] = WeakKeyDictionary()


def prepare_references(base: Base, items: Iterable[PreferenceItem]) -> None:
    """Compute the references of these items with the model as it is before training, or read those of a resumed run.

    With several processes, each computes all of them.
    """
    own, path = _of(base), Path(base.config.out) / FILE
    keyed = {_key(item): item for item in items}
    stored = _read(path) if (path.parent / "checkpoints").is_dir() else {}  # else it may be of another run
    own |= {key: values for key, values in stored.items() if key in keyed}
    add_references(base, keyed.values())
    if path.parent.is_dir() and not keyed.keys() <= stored.keys():
        _write(path, {key: own[key] for key in keyed})


def add_references(base: Base, items: Iterable[PreferenceItem]) -> None:
    """Compute the references that these items lack."""
    own = _of(base)
    missing = [item for item in items if _key(item) not in own]
    if not missing:
        return
    rows = [row for item in missing for row in _rows(item)]
    with _before_training(base):
        found = iter(log_probabilities(base.model, base.processor, rows))
    for item in missing:
        own[_key(item)] = tuple(next(found) for _ in _rows(item))


def is_its_own(base: Base, items: Iterable[PreferenceItem]) -> bool:
    """Whether a model without adapters would be compared with itself: some references are not known from before."""
    own = _of(base)
    return not adapters(base.model) and any(_key(item) not in own for item in items)


def references_of(base: Base, items: Sequence[PreferenceItem]) -> list[tuple[float, ...]]:
    """Return the references of items: a value for each answer, and one for the mismatched row, if there is one.

    Raises TrainError for an item whose reference has not been computed.
    """
    own = _of(base)
    for item in items:
        if _key(item) not in own:
            raise TrainError(f"{item.where}: its reference was not computed before training\n  call prepare first")
    return [own[_key(item)] for item in items]


def _rows(item: PreferenceItem) -> list[Any]:
    return [*item.answers, *([item.mismatched] if item.mismatched else [])]


def _key(item: PreferenceItem) -> bytes:
    return hashlib.blake2b(item.digest(), digest_size=KEY).digest()


def _of(base: Base) -> dict[bytes, tuple[float, ...]]:
    return _known.setdefault(base.model, {}).setdefault(getattr(base.config, "adapter", None), {})


def _before_training(base: Base) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model is as it is before training."""
    if base.config.adapter is not None or not adapters(base.model):
        return contextlib.nullcontext()
    return method_of(base.config.method).base_alone(base.model)


def _read(path: Path) -> Mapping[bytes, tuple[float, ...]]:
    """Read the file of an interrupted run. Raises TrainError if it is damaged."""
    if not path.exists():
        return {}
    try:
        tensors, _ = read_tensors(path)
        keys, values = tensors["keys"].numpy(), tensors["values"].tolist()
        return {key.tobytes(): tuple(own) for key, own in zip(keys, values, strict=True)}
    except (AdapterError, KeyError, ValueError) as error:
        raise TrainError(
            f"{path} is damaged: it has the log-probabilities of the reference, with which this run began\n"
            "  remove it: they are computed again, with the base or adapter that this run started from"
        ) from error


def _write(path: Path, own: Mapping[bytes, tuple[float, ...]]) -> None:
    keys = torch.frombuffer(bytearray(b"".join(own)), dtype=torch.uint8).view(-1, KEY)
    values = torch.tensor(list(own.values()), dtype=torch.float32)  # as they were computed
    write_tensors(path, {"keys": keys, "values": values}, {})
