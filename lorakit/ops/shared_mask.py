"""Share one dropout mask among all adapted linears that read the same tensor, as if they were one linear.

PEFT draws a mask for each linear. Here q, k and v (gate and up, ...) share one, which is drawn and stored once. "The
same tensor" means the same storage at the same version, with the same shape and strides, so no class or parent module
needs to be known.

Every linear still draws its own seed, in the order of the calls, and the first one is used. So torch's generator
advances in the same way however many linears share a mask. Gradient checkpointing runs a part of the forward again with
the generator reset; the drawn seed then identifies the mask that a linear had, even if the first reader is outside that
part. When a linear reads the same tensor a second time, a new pass begins, with a new mask.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from .dropout import Mask, draw_mask, draw_seed, has_no_values

# Seeds remembered for a tensor that is read in many passes (all rows of a small data set, say): far more than there are
# graphs alive at once.
REMEMBERED = 4096


@dataclass
class _Readers:
    """The modules that have read one input in this pass, and their shared mask. `seeds`: seed drawn -> seed used."""

    mask: Mask
    seed: int
    modules: set[int] = field(default_factory=set)  # by id
    seeds: OrderedDict[int, int] = field(default_factory=OrderedDict)


class _Inputs:
    """The inputs whose storage is alive, by storage, then by view, p and version. Shared by all threads, as backward
    may run in another one.
    """

    def __init__(self) -> None:
        # Reentrant: a storage, and its entry, may be freed while the same thread holds the lock.
        self.lock = threading.RLock()
        self.views: dict[int, tuple[weakref.ref, dict[tuple, _Readers]]] = {}


_inputs = _Inputs()


def mask_for(x: Tensor, p: float, reader: object) -> Mask:
    """Return the dropout mask with which `reader` (a module) reads its input x."""
    drawn = draw_seed()
    if has_no_values(x):  # it has no storage to identify it by
        return draw_mask(x, p, drawn)
    with _inputs.lock:
        return _shared(x, p, reader, drawn)


def _shared(x: Tensor, p: float, reader: object, drawn: int) -> Mask:
    readers, version = _views(x), 0 if x.is_inference() else x._version
    for outdated in [key for key in readers if key[0] < version]:  # overwritten since, so it cannot be read again
        del readers[outdated]
    key = (version, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, p)
    current = readers.get(key)
    if current is None:
        current = readers[key] = _Readers(draw_mask(x, p, drawn), drawn)
    elif drawn in current.seeds:  # run again by gradient checkpointing
        seed = current.seeds[drawn]
        if seed != current.seed:
            return draw_mask(x, p, seed)
    elif id(reader) in current.modules:
        current.mask, current.seed = draw_mask(x, p, drawn), drawn
        current.modules.clear()
    current.modules.add(id(reader))
    current.seeds[drawn] = current.seed
    if len(current.seeds) > REMEMBERED:
        current.seeds.popitem(last=False)
    return current.mask


def _views(x: Tensor) -> dict[tuple, _Readers]:
    storage = x.untyped_storage()
    address = storage._cdata
    entry = _inputs.views.get(address)
    if entry is None or entry[0]() is None:
        entry = weakref.ref(storage, lambda _: _inputs.views.pop(address, None)), {}
        _inputs.views[address] = entry
    return entry[1]
