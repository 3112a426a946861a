"""Give memory of freed tensors back to the system, and keep Python's garbage collector from stopping the steps.

glibc keeps small freed blocks in its heap: 100 adapters of 16 to 45 KB a tensor left 785 MB of 498, and 539 after
`malloc_trim`. Other C libraries have no such call; there this does nothing.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any


def trim() -> None:
    """Return free memory at the top of the C heap, and free pages within it, to the system. Takes milliseconds.

    Adapters have no reference cycles, so no garbage need be collected before.
    """
    function = _malloc_trim()
    if function is not None:
        function(0)


def settle() -> None:
    """Leave out what is alive now when garbage is looked for: the model, and the libraries' objects.

    For a process that serves, once it is ready. A full collection of all objects, which Python starts by itself as new
    ones come, stopped every thread for 0.25 s.
    """
    gc.collect()
    gc.freeze()


@cache
def _malloc_trim() -> Any:
    """Return glibc's function, which lets other threads run meanwhile; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
