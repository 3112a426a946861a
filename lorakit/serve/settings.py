"""What `lorakit serve` was asked for, checked and in the types that the parts take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Quantization
from .guard.guarded import GuardSettings


@dataclass(frozen=True)
class ServeSettings:
    """name: what the base is called. adapters: name -> path. hub: OWNER or OWNER/NAME, which HTTP may load.

    roots: folders below which every adapter has a name, and from which HTTP may load.
    context: positions for prompt and answer; None: what the model has. device_adapters: attached at once.
    adapter_memory, prefix_memory: bytes. state: where to keep what was loaded over HTTP. vllm: its command.
    vllm_arguments: more flags for it.
    """

    base: str
    name: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()
    hub: tuple[str, ...] = ()
    allow_pickle: bool = False
    engine: str = "embedded"
    vllm: str | None = None
    vllm_arguments: tuple[str, ...] = ()
    max_rank: int | None = None
    rows: int = 32
    context: int | None = None
    device_adapters: int = 32
    adapter_memory: int = 2 * 2**30
    prefix_memory: int = 256 * 2**20
    precision: str = "auto"
    quantization: Quantization = field(default_factory=Quantization)
    chat_template: str | None = None  # its text
    state: Path | None = None
    access_log: bool = True
    guard: GuardSettings = field(default_factory=GuardSettings)
