"""One dropout mask for all adapted linears that read the same tensor, as if they were one linear.

PEFT draws a mask for each linear. Here q, k and v (gate and up, ...) share theirs: it is drawn and kept once. "The same
tensor" is the same storage at the same version, seen through the same shape and strides. No class or parent module
needs to be known.

Every linear still draws a seed of its own, in the order of the calls, and the first one's counts. So torch's generator
moves on the same way however many linears share, and gradient checkpointing, which runs a part of the forward again
with the generator set back, can tell by the seed drawn which mask a linear had, even if the first reader lies outside
of the part. When a linear reads the same tensor a second time, a new pass begins, with a new mask.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from .dropout import Mask, draw_mask, draw_seed, planned

# Seeds remembered of a tensor that is read in pass after pass (all rows of a small data set, say): far more than graphs
# are ever alive.
REMEMBERED = 4096


@dataclass
class _Readers:
    """Who has read one input in this pass, the mask they share, and which seed each draw led to."""

    mask: Mask
    seed: int
    came: set[int] = field(default_factory=set)
    seeds: OrderedDict[int, int] = field(default_factory=OrderedDict)  # drawn -> used


class _Inputs:
    """The inputs whose storage is alive: by storage, then by view, p and version. Of all threads, as backward may run
    in another one.
    """

    def __init__(self) -> None:
        # a storage may be freed, and its entry with it, while the same thread holds the lock
        self.lock = threading.RLock()
        self.views: dict[int, tuple[weakref.ref, dict[tuple, _Readers]]] = {}


_inputs = _Inputs()


def mask_for(x: Tensor, p: float, reader: object) -> Mask:
    """The mask with which `reader` (a module) drops elements of its input x."""
    drawn = draw_seed()
    if planned(x):  # its storage says nothing
        return draw_mask(x, p, drawn)
    with _inputs.lock:
        return _shared(x, p, reader, drawn)


def _shared(x: Tensor, p: float, reader: object, drawn: int) -> Mask:
    readers, version = _views(x), 0 if x.is_inference() else x._version
    for outdated in [key for key in readers if key[0] < version]:  # written into since: nobody can read it again
        del readers[outdated]
    key = (version, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, p)
    known = readers.get(key)
    if known is None:
        known = readers[key] = _Readers(draw_mask(x, p, drawn), drawn)
    elif drawn in known.seeds:  # run again by gradient checkpointing
        seed = known.seeds[drawn]
        if seed != known.seed:
            return draw_mask(x, p, seed)
    elif id(reader) in known.came:
        known.mask, known.seed = draw_mask(x, p, drawn), drawn
        known.came.clear()
    known.came.add(id(reader))
    known.seeds[drawn] = known.seed
    if len(known.seeds) > REMEMBERED:
        known.seeds.popitem(last=False)
    return known.mask


def _views(x: Tensor) -> dict[tuple, _Readers]:
    storage = x.untyped_storage()
    place = storage._cdata
    found = _inputs.views.get(place)
    if found is None or found[0]() is None:
        found = weakref.ref(storage, lambda _: _inputs.views.pop(place, None)), {}
        _inputs.views[place] = found
    return found[1]
