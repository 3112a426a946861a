"""What a running server is made of: the parts that answer a request, and how much one may ask of them.

api  ->  Service  ->  registry   public name -> the adapters that a request holds until it is done
                  ->  renderer   messages -> token ids, with the adapter's own template
                  ->  engine     token ids -> token ids
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..version import VERSION
from .guard.limits import Limits

if TYPE_CHECKING:
    from .engine import Engine, Facts
    from .registry import Registry
    from .renderer import Renderer


@dataclass(frozen=True)
class Service:
    """The parts of a server. facts: what `engine.start()` returned. created: when it started, in seconds since 1970."""

    engine: Engine
    facts: Facts
    registry: Registry
    renderer: Renderer
    limits: Limits = field(default_factory=Limits)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of every answer: seeds give the same answer only where it is the same."""
        return f"lorakit-{VERSION}"
