"""Adapters that PEFT's own loading would misread: linears of a mixture of experts that are named like its experts.

For models whose experts transformers 5 stacks into one parameter, PEFT (0.18 to 0.21, `transformers_weight_conversion`)
takes targets called gate_proj, up_proj, down_proj or gate for the experts of older releases, by their last name alone,
and turns them into targets of those parameters. An update of a dense layer's or a shared expert's `gate_proj` is then
dropped with a warning about missing keys, and the output is another one. Full names and patterns do not help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..adapter.adapter import Adapter
from ..errors import listing

# Model types, written as the names of their classes begin, without underscores and in lower case.
_QWEN2_MOE = (
    "afmoe",
    "beam",
    "cohere2moe",
    "deepseekv2",
    "deepseekv3",
    "dots1",
    "ernie45moe",
    "exaonemoe",
    "flexolmo",
    "glm4moe",
    "glm4vmoe",
    "glmmoedsa",
    "hunyuanmoev1",
    "hunyuanv1moe",
    "longcatflash",
    "mellum",
    "olmoe",
    "qwen3moe",
    "qwen3next",
    "qwen3omnimoe",
    "sarvammla",
    "solaropen",
)
_MIXTRAL = ("minimax", "mixtral")
_TAKEN = {
    **dict.fromkeys(_QWEN2_MOE, ("gate_proj", "up_proj", "down_proj", "gate")),
    **dict.fromkeys(_MIXTRAL, ("w1", "w2", "w3", "gate")),
}


def misread(adapter: Adapter) -> list[str]:
    """Return the modules whose updates PEFT would drop; empty where the adapter does not tell its base's class."""
    print_ = adapter.metadata.get("fingerprint")
    architecture = print_.get("architecture") if isinstance(print_, Mapping) else None
    # PEFT converts no other kind of adapter.
    converted = [m for m, u in adapter.updates.items() if u.variant in ("lora", "dora")]
    return dropped(architecture, converted) if isinstance(architecture, str) else []


def dropped(architecture: str, modules: Iterable[str]) -> list[str]:
    """The same of the adapted modules of a model of this class."""
    name = architecture.replace("_", "").lower()
    taken = next((names for kind, names in _TAKEN.items() if name.startswith(kind)), ())
    return [m for m in modules if m.rsplit(".", 1)[-1] in taken]


def note(modules: Sequence[str], total: int) -> str | None:
    """Say what PEFT would not load of an adapter with `total` updates, and what to do; None if nothing is dropped."""
    if not modules:
        return None
    endings = sorted({m.rsplit(".", 1)[-1] for m in modules})
    return (
        f"PEFT would drop {len(modules)} of the adapter's {total} updates, such as {modules[0]}: for this model it "
        f"takes {listing(endings)} for experts, whatever module has that name\n"
        f"  lorakit and vLLM load it as it is; for PEFT and transformers train with exclude={endings} (--exclude "
        f"{','.join(endings)}), or merge the adapter into its base"
    )
