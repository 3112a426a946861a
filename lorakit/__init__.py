"""lorakit: low-rank adaptation (LoRA) for language models, diffusion models and any other PyTorch model.

    import lorakit as lk

    lk.attach(model, lk.LoraConfig(rank=16, alpha=32, targets="all-linear"))
    ...                                   # any training loop
    lk.capture(model).save("out/")

Names are imported when first used, so that `import lorakit` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import VERSION as __version__

if TYPE_CHECKING:
    from . import integrations
    from .adapter.adapter import Adapter
    from .adapter.algebra.combine import combine
    from .adapter.lora import Factors
    from .bases.load import load_base
    from .config import LoraConfig
    from .errors import LorakitError
    from .model.activate import activate, active, adapters
    from .model.attach import attach
    from .model.capture import capture
    from .model.detach import detach
    from .model.merge import merge, unmerge
    from .model.route import route
    from .model.summary import summary
    from .model.training import after_step, parameter_groups, penalty

_HOME = {
    "Adapter": ".adapter.adapter",
    "Factors": ".adapter.lora",
    "combine": ".adapter.algebra.combine",
    "load_base": ".bases.load",
    "LoraConfig": ".config",
    "LorakitError": ".errors",
    **{name: f".model.{name}" for name in ("activate", "attach", "capture", "detach", "merge", "route", "summary")},
    "active": ".model.activate",
    "adapters": ".model.activate",
    "unmerge": ".model.merge",
    **dict.fromkeys(("parameter_groups", "penalty", "after_step"), ".model.training"),
}

__all__ = [  # noqa: RUF022 (in the order one meets them)
    "load_base",
    "LoraConfig",
    "Adapter",
    "Factors",
    "attach",
    "capture",
    "activate",
    "active",
    "adapters",
    "route",
    "merge",
    "unmerge",
    "detach",
    "summary",
    "parameter_groups",
    "penalty",
    "after_step",
    "combine",
    "integrations",
    "LorakitError",
    "__version__",
]


def __getattr__(name: str):
    if name == "integrations":
        return importlib.import_module(".integrations", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module 'lorakit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
