"""What is inside an adapter, or which modules of a model can be adapted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import LoraConfig
from .errors import LorakitError
from .models.base import EMBEDDED, load_config

if TYPE_CHECKING:
    from .adapter.adapter import Adapter
    from .adapter.factors import Factors


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module; `norm` is ΔW's Frobenius norm."""

    name: str
    kind: str
    size_in: int
    size_out: int
    rank: int
    alpha: float
    scale: float
    norm: float
    dtype: str


@dataclass(frozen=True)
class AdapterFacts:
    source: str
    base: str | None
    task: str | None
    rank: int
    parameters: int
    rslora: bool
    saved: dict[str, list[int]]
    modules: list[ModuleFacts]
    metadata: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, every_module: bool = False) -> None:
        """Print; modules of one ending and shape in one line, unless every one is asked for."""
        from rich.console import Console
        from rich.table import Table

        print(
            f"{self.source}: rank {self.rank}, {self.parameters:,} parameters in {len(self.modules)} modules; base: {self.base or 'not stated'}"
        )
        table = Table()
        table.add_column("module")
        for column in ("count", "in", "out", "rank", "alpha", "scale", "|ΔW| least", "most"):
            table.add_column(column, justify="right")
        for key, group in self._groups(every_module).items():
            first, norms = group[0], [m.norm for m in group]
            table.add_row(
                key[0], str(len(group)), str(first.size_in), str(first.size_out), str(first.rank), f"{first.alpha:g}", f"{first.scale:g}", f"{min(norms):.3g}", f"{max(norms):.3g}"
            )  # fmt: skip
        Console().print(table)
        zero = [m.name for m in self.modules if m.norm == 0]
        if zero:
            print(f"{len(zero)} of {len(self.modules)} modules have ΔW = 0: they change nothing")
        for name, shape in self.saved.items():
            print(f"saved whole: {name} {shape}")
        for section in ("recipe", "data", "metrics"):
            if self.metadata.get(section):
                print(f"{section}: " + ", ".join(f"{k} {v}" for k, v in self.metadata[section].items()))

    def _groups(self, every_module: bool) -> dict[tuple, list[ModuleFacts]]:
        groups: dict[tuple, list[ModuleFacts]] = {}
        for m in self.modules:
            name = m.name if every_module else m.name.rsplit(".", 1)[-1]
            groups.setdefault((name, m.size_in, m.size_out, m.rank, m.alpha), []).append(m)
        return groups


def describe_adapter(adapter: Adapter, source: str) -> AdapterFacts:
    """The facts of an adapter; no ΔW is built."""
    modules = [
        ModuleFacts(
            name, f.kind, f.A[0].numel(), f.B.shape[0], f.rank, f.alpha, f.scale, norm(f), str(f.A.dtype).removeprefix("torch.")
        )
        for name, f in adapter.factors.items()
    ]  # fmt: skip
    saved = {name: list(t.shape) for name, t in adapter.saved.items()}
    return AdapterFacts(
        source,
        adapter.config.base,
        adapter.config.task,
        adapter.rank,
        adapter.parameters,
        adapter.config.rslora,
        saved,
        modules,
        adapter.metadata,
    )


def norm(f: Factors) -> float:
    """The Frobenius norm of ΔW from the factors: ‖B A‖² = trace((BᵀB)(A Aᵀ)), an r x r product."""
    import torch

    A, B = f.A.flatten(1).to(torch.float64), f.B.flatten(1).to(torch.float64)
    if A.shape[0] != B.shape[1]:  # PEFT's grouped convolution: each group has factors of its own
        blocks = zip(A.chunk(f.groups), B.chunk(f.groups), strict=True)
        return f.scale * math.sqrt(sum(_squared(a, b) for a, b in blocks))
    return f.scale * math.sqrt(_squared(A, B))


def _squared(A, B) -> float:
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))


@dataclass(frozen=True)
class ModelFacts:
    source: str
    architecture: str
    parameters: int
    modules: list[tuple[str, str, list[int], bool]]  # name, class, weight's shape, whether 'all-linear' means it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, every_module: bool = False) -> None:
        """Print the modules that can be adapted, each or by ending."""
        print(f"{self.source}: {self.architecture}, {self.parameters:,} parameters; modules that can be adapted (* those of 'all-linear'):")
        groups: dict[tuple, int] = {}
        for name, kind, shape, linear in self.modules:
            key = (name if every_module else name.rsplit(".", 1)[-1], kind, "x".join(map(str, shape)), "*" if linear else " ")
            groups[key] = groups.get(key, 0) + 1
        width = max((len(k[0]) for k in groups), default=0)
        for (name, kind, shape, mark), count in groups.items():
            print(f" {mark} {name:<{width}}  {kind} {shape}" + (f"  x {count}" if count > 1 else ""))


def is_model(source: str) -> bool:
    """Whether `source` names a model, not an adapter."""
    path = Path(source)
    return source == EMBEDDED or ((path / "config.json").exists() and not (path / "adapter_config.json").exists())


def describe_model(source: str) -> ModelFacts:
    """The modules of a model folder (built without its weights) that can be adapted."""
    import torch
    import transformers

    from .layers.swap import mixin_for
    from .layers.targets import find_targets, module_names

    config = load_config(source)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise LorakitError(
            f"{source}: transformers has no architecture '{name}' (config.json, architectures), so its modules are not known"
        )
    with torch.device("meta"):
        model = kind(config)
    linear = find_targets(model, LoraConfig()).modules
    rows = [
        (name, type(m).__name__, list(m.weight.shape), name in linear)  # type: ignore[union-attr, arg-type]
        for name, m in module_names(model).items()
        if mixin_for(m) is not None
    ]
    return ModelFacts(source, type(model).__name__, sum(p.numel() for p in model.parameters()), rows)
