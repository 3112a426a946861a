"""Describe what an adapter contains, or which modules of a model can be adapted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.algebra.product import norm
from ..adapter.algebra.spectrum import spectrum
from ..adapter.virtual_tokens import BODY, VirtualTokens
from ..bases.load import EMBEDDED, load_config
from ..bases.pipeline import component_of
from ..config import LoraConfig
from ..errors import LorakitError, listing
from .heatmap import Grid, grids
from .kinds import KINDS
from .tables import Table, brief, mean, printable
from .training_notes import training

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..adapter.adapter import Adapter
    from ..adapter.update import Update

__all__ = [
    "AdapterFacts",
    "ModelFacts",
    "ModuleFacts",
    "describe_adapter",
    "describe_model",
    "is_model",
    "norm",
    "not_finite",
]

# The quantities a heat map can show, and their titles.
QUANTITIES = {
    "norm": "‖ΔW‖",
    "relative": "‖ΔW‖ / ‖W‖",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
}


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module. `norm`: Frobenius norm of ΔW (for a DoRA, of s · B A). `relative`: ‖change‖ / ‖W‖.

    `dead`: changes nothing.
    `kind`: linear, embedding or conv; loha, lokr, ia3, bottleneck, tokens or dense. `adapter.algebra.spectrum` defines
    the effective and the stable rank.
    """

    name: str
    kind: str
    size_in: int
    size_out: int
    rank: int
    alpha: float
    scale: float
    norm: float
    dtype: str
    effective_rank: float | None = None
    stable_rank: float = 0.0
    relative: float | None = None
    dora: bool = False
    dead: bool = False


@dataclass(frozen=True)
class AdapterFacts:
    """The result of `describe_adapter`. `saved`, `embeddings`: shapes by name."""

    source: str
    base: str | None
    task: str | None
    rank: int
    parameters: int
    rslora: bool
    saved: dict[str, list[int]]
    modules: list[ModuleFacts]
    metadata: Mapping[str, Any]
    format: str | None = None
    targets: list[str] = field(default_factory=list)
    # rank -> number of modules with it; likewise for alphas and dtypes
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    bytes: int | None = None
    packed: int = 0  # number of packed projections
    unlike_base: list[str] = field(default_factory=list)  # how the given base differs from the one it was trained on
    embeddings: dict[str, list[int]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    virtual: str | None = None  # its virtual tokens, which change no module

    @property
    def dead(self) -> list[str]:
        """Names of modules that change nothing."""
        return [m.name for m in self.modules if m.dead]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dead": self.dead}

    def grids(self, quantity: str = "norm") -> list[Grid]:
        """Heat maps of a quantity (a key of `QUANTITIES`) over all modules."""
        return grids({m.name: getattr(m, quantity) for m in self.modules}, QUANTITIES[quantity])

    def show(self, every_module: bool = False, console: Console | None = None) -> None:
        """Print the facts. Modules with the same ending and shape share a line, unless `every_module`."""
        from rich.console import Console
        from rich.text import Text

        console = console or Console()

        def say(line: str) -> None:
            console.print(Text(line), soft_wrap=not console.is_terminal)

        source, base = printable(self.source), printable(self.base or "not stated")
        say(f"{source}: rank {self.rank}, {self.parameters:,} parameters in {len(self.modules)} modules; base: {base}")
        say("; ".join(self._file()))
        if self.unlike_base:
            say(
                "trained on a different base than the one given, so figures relative to it mean little: "
                + "; ".join(map(printable, self.unlike_base))
            )
        if self.packed:
            say(f"{self.packed} packed projections: the zeros between their blocks are not counted as parameters")
        if self.virtual:
            say(self.virtual)
        if self.modules:
            console.print(self._table(every_module))
        if self.dead:
            names = printable(listing(self.dead, 3))
            say(f"{len(self.dead)} of {len(self.modules)} modules have ΔW = 0 and no effect ({names})")
        for name, shape in self.saved.items():
            say(f"saved weight: {printable(name)} {shape}")
        for token, shape in self.embeddings.items():
            say(f"textual-inversion embedding: {printable(token)} {shape}")
        for section in ("recipe", "data", "metrics"):
            if isinstance(self.metadata.get(section), Mapping) and self.metadata[section]:
                facts = (f"{k} {brief(v)}" for k, v in self.metadata[section].items() if v is not None)
                say(printable(f"{section}: {', '.join(facts)}"))
        start = self.metadata.get("started_from")
        if isinstance(start, Mapping):
            say(printable(f"started from: {start.get('adapter')}, SHA-256 {str(start.get('sha256'))[:12]}"))
        for key, value in self.training.items():
            text = ", ".join(f"{k} ({v})" for k, v in value.items()) if isinstance(value, dict) else value
            say(printable(f"{key}: {', '.join(text) if isinstance(text, list) else text}"))

    def _file(self) -> list[str]:
        """Facts about the file, and the base's fingerprint."""
        facts = [f"format {self.format}"] if self.format else []
        parts = Counter(filter(None, (component_of(m.name) for m in self.modules)))
        facts += [f"{part}: {count} modules" for part, count in parts.items()]
        facts += [", ".join(self.dtypes)] if self.dtypes else []
        facts += [f"{self.bytes:,} bytes"] if self.bytes is not None else []
        fingerprint = self.metadata.get("fingerprint")
        if isinstance(fingerprint, Mapping):
            parameters = fingerprint.get("parameters")
            count = f"{parameters:,} parameters, " if isinstance(parameters, int) else ""
            base = f"{fingerprint.get('architecture')}, {count}shapes {fingerprint.get('shapes')}"
            facts.append(printable(f"fingerprint of the base: {base}"))
        return facts or ["format not stated"]

    def _table(self, every_module: bool) -> Table:
        relative = any(m.relative is not None for m in self.modules)
        heads = ["module", "count", "in", "out", "rank", "alpha", "scale", "|ΔW|\nmin", "max"]
        if every_module:
            heads = ["module", "in", "out", "rank", "alpha", "scale", "|ΔW|"]
        heads += ["effect.\nrank", "stable\nrank", *(["|ΔW| /\n|W|"] if relative else [])]
        rows = []
        for (name, *_), group in self._groups(every_module).items():
            first, norms = group[0], [m.norm for m in group]
            kind = f" {KINDS[first.kind]}" if first.kind in KINDS else ""
            sizes = [*([] if every_module else [len(group)]), first.size_in, first.size_out, first.rank]
            row = [f"{name}{kind}{' DoRA' if first.dora else ''}", *map(str, sizes)]
            row += [f"{first.alpha:g}", f"{first.scale:g}"]
            row += [f"{norm:.3g}" for norm in (norms if every_module else (min(norms), max(norms)))]
            row += [mean((m.effective_rank for m in group), ".1f"), mean((m.stable_rank for m in group), ".1f")]
            rows.append([*row, mean((m.relative for m in group), ".2g")] if relative else row)
        return Table("", heads, rows)

    def _groups(self, every_module: bool) -> dict[tuple, list[ModuleFacts]]:
        groups: dict[tuple, list[ModuleFacts]] = {}
        for m in self.modules:
            name = m.name if every_module else ending(m.name)
            groups.setdefault((name, m.size_in, m.size_out, m.rank, m.alpha, m.kind, m.dora), []).append(m)
        return groups


def ending(module: str) -> str:
    """The last part of a name, or the last two if it ends in a number (`to_out.0`)."""
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def describe_adapter(adapter: Adapter, source: str, base: Path | None = None, form: str | None = None) -> AdapterFacts:
    """Describe an adapter without forming any low-rank ΔW.

    source: the path it was read from. base: a checkpoint folder, for norms relative to its weights. form: the format it
        was read from.
    """
    changed = {name: update for name, update in adapter.updates.items() if name != BODY}
    relative: Mapping[str, float] = {}
    differences: list[str] = []
    if base is not None:
        from ..checkpoint.same_base import compare_with_base
        from ..checkpoint.weights import open_weights
        from .amplification import relative_norms

        relative = relative_norms(replace(adapter, updates=changed), open_weights(base, changed))
        differences = compare_with_base(base, adapter)
    modules = [_module(name, update, relative.get(name)) for name, update in changed.items()]
    virtual = adapter.updates.get(BODY)
    tensors = [t for update in adapter.updates.values() for t in update.tensors().values()]
    tensors += [*adapter.saved.values(), *adapter.embeddings.values()]
    return AdapterFacts(
        source,
        adapter.config.base,
        adapter.config.task,
        max((m.rank for m in modules), default=0),
        adapter.parameters,
        adapter.config.rslora,
        {name: list(t.shape) for name, t in adapter.saved.items()},
        modules,
        adapter.metadata,
        format=form,
        targets=sorted({ending(m.name) for m in modules}),
        ranks=_counts([str(m.rank) for m in modules]),
        alphas=_counts([f"{m.alpha:g}" for m in modules]),
        dtypes=_counts([str(t.dtype).removeprefix("torch.") for t in tensors]),
        bytes=_size(source),
        packed=sum(bool(f.parts) for f in adapter.factors.values()),
        unlike_base=differences,
        embeddings={token: list(t.shape) for token, t in adapter.embeddings.items()},
        training=training(adapter.metadata.get("header")),
        virtual=virtual.described() if isinstance(virtual, VirtualTokens) else None,
    )


def _module(name: str, update: Update, relative: float | None) -> ModuleFacts:
    found = spectrum(update)
    tensors, own = update.tensors(), update.without_base()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    alone = update.needs_base and update.variant not in ("dora", "biased")  # those are built on another update
    return ModuleFacts(
        name,
        update.variant if alone else getattr(own, "kind", own.variant),
        *found.sizes,
        update.rank,
        getattr(own, "alpha", float(update.rank)),
        update.scale,
        found.norm,
        dtype,
        found.effective_rank,
        found.stable_rank,
        relative,
        update.variant == "dora",
        dead=found.norm == 0 and not update.needs_base and not update.changes_bias,
    )


def _counts(values: list[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _size(source: str) -> int | None:
    """Size in bytes of an adapter's file, or of the weights file in its folder; None if not local."""
    file = _weights(source)
    return file.stat().st_size if file is not None else None


def _weights(source: str) -> Path | None:
    """The file with an adapter's tensors; None if the source is not local."""
    from ..formats import find, weights_of

    return weights_of(find(source)) if Path(source).expanduser().exists() else None


def not_finite(source: str) -> dict[str, int]:
    """Count the NaN and infinite elements of an adapter file: key -> count, only for keys that have some."""
    import torch

    from ..io.tensors import read_tensors

    file = _weights(source)
    tensors: dict[str, Tensor] = (
        read_tensors(file)[0] if file and file.suffix in (".safetensors", ".bin", ".pt") else {}
    )
    bad = {key: int((~torch.isfinite(t)).sum()) for key, t in tensors.items() if t.is_floating_point()}
    return {key: count for key, count in bad.items() if count}


@dataclass(frozen=True)
class ModelFacts:
    """The modules of a model that can be adapted."""

    source: str
    architecture: str
    parameters: int
    modules: list[tuple[str, str, list[int], bool]]  # name, class, weight shape, whether 'all-linear' includes it
    skipped: dict[str, str] = field(default_factory=dict)  # linear modules that 'all-linear' leaves out, and why
    unreached: dict[str, int] = field(default_factory=dict)  # elements of weights that no adapter can reach, by name
    unreached_share: float = 0.0  # of all parameters

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, every_module: bool = False, console: Console | None = None) -> None:
        """Print the modules that can be adapted, grouped by name ending unless `every_module`."""
        from rich.console import Console

        print(f"{self.source}: {self.architecture}, {self.parameters:,} parameters")
        print("modules that can be adapted (*: included in 'all-linear'):")
        groups: dict[tuple, int] = {}
        for name, kind, shape, linear in self.modules:
            key = (
                name if every_module else name.rsplit(".", 1)[-1],
                kind,
                "x".join(map(str, shape)),
                "*" if linear else " ",
            )
            groups[key] = groups.get(key, 0) + 1
        heads = ["   module", "class", "weight", *([] if every_module else ["count"])]
        rows = [
            [f" {mark} {name}", kind, shape, *([] if every_module else [str(count)])]
            for (name, kind, shape, mark), count in groups.items()
        ]
        (console or Console()).print(Table("", heads, rows))
        for why, names in _by_reason(self.skipped).items():
            print(f"left out of 'all-linear': {listing(names, 3)} ({why})")
        if self.unreached:
            print(f"not reached by any adapter: {100 * self.unreached_share:.3g} % of the weights, ", end="")
            print(listing(self.unreached, 4))


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def is_model(source: str) -> bool:
    """Whether `source` is a model rather than an adapter."""
    path = Path(source)
    return source == EMBEDDED or ((path / "config.json").exists() and not (path / "adapter_config.json").exists())


def describe_model(source: str) -> ModelFacts:
    """List a model's modules that can be adapted; the model is built without weights.

    LorakitError for an unknown architecture.
    """
    import torch
    import transformers

    from ..layers.swap import mixin_for
    from ..layers.targets import called_by_weight, find_targets, module_names
    from ..layers.unreached import unreached

    config = load_config(source)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise LorakitError(
            f"{source}: transformers has no architecture '{name}' (config.json)\n  update transformers, if it is new"
        )
    with torch.device("meta"):
        model = kind(config)
    found = find_targets(model, LoraConfig())
    linear, missed, names = found.modules, unreached(model), module_names(model)
    without_effect = called_by_weight(names)
    rows = [
        (name, type(m).__name__, list(m.get_parameter("weight").shape), name in linear)
        for name, m in names.items()
        if mixin_for(m) is not None and name not in without_effect
    ]
    return ModelFacts(
        source,
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        rows,
        found.skipped,
        missed.names if missed else {},
        missed.share if missed else 0.0,
    )
