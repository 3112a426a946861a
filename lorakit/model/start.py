"""Start a new adapter from the base's weights or from data (`LoraConfig.init`), before it is attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig, scale_of
from ..errors import ConfigError, StateError, TargetError
from ..layers.bases import base_of, quantized
from ..layers.init import start_of, starts
from ..layers.init.batches import FirstBatches, Loss, undisturbed
from ..layers.init.matrix import Matrix
from ..layers.init.ranks import redistributed
from ..layers.init.start import Evidence, Part, Start
from ..layers.token_targets import variant_of
from ..layers.updates.update import live
from .activate import set_active
from .originals import Originals, originals_of
from .state import State


@dataclass(frozen=True)
class Sources:
    """What `attach` was given for a start. `model`: as the user gave it. `batches`: the first are taken, or it returns
    as many as there are to be. `ranks`: of a resumed run whose checkpoint holds the start: module -> rank. Nothing is
    computed then, as the values are about to be restored.
    """

    model: Any = None
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None
    loss: Loss | None = None
    originals: Originals | None = None
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Started:
    """`factors`: module -> its A and B in the layer's layout, None if they are not computed yet; other modules start at
    random. `subtracted`: whether the start is kept and subtracted. `only_on`: how the base is quantized that the
    adapter is right on; None: any base.
    """

    config: LoraConfig
    factors: Mapping[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    subtracted: bool = False
    dropped: Mapping[str, str] = field(default_factory=dict)
    only_on: str | None = None


def check_sources(config: LoraConfig, sources: Sources) -> None:
    """Raise ConfigError if the start lacks what it is made from, or something is given that it does not use."""
    start = start_of(config.init)
    for name, needed in (("batches", _needs(start, "batches")), ("originals", _needs(start, "originals"))):
        if getattr(sources, name) is not None and not needed:
            made = [init for init in starts() if _needs(start_of(init), name)]
            raise ConfigError(
                f"attach(..., {name}=...) is for init={' or '.join(map(repr, made))}, and this config has "
                f"init={config.init!r}\n  remove {name}, or give that init"
            )
    if sources.loss is not None and sources.batches is None:
        raise ConfigError("attach(..., loss=...) is the loss of a batch, and there are no batches\n  give batches too")


def _needs(start: Start | None, what: str) -> bool:
    return start is not None and bool(getattr(start, f"needs_{what}"))


def begin(
    model: nn.Module, state: State, config: LoraConfig, modules: Mapping[str, nn.Module], sources: Sources
) -> Started:
    """Compute the start of these modules' updates. The model is left as it was.

    Raises ConfigError where the kind of update has no such start or the data is missing, TargetError and StateError for
    modules that cannot start so.
    """
    start = start_of(config.init)
    if start is None:
        return Started(config)
    if not live(config.variant).starts:
        raise ConfigError(
            f"init={config.init!r} starts low-rank factors A and B, and variant={config.variant!r} has others\n"
            "  use init='default', or variant='lora'"
        )
    own = {m: module for m, module in modules.items() if variant_of(config, m) == config.variant}
    matrices = {m: Matrix(module, config.parts_of(m)) for m, module in own.items()}
    _check_kinds(matrices, start, config.init)
    if sources.ranks is not None:
        return _restored(config, matrices, sources.ranks, start)
    if _without_values(matrices):
        return Started(config, dict.fromkeys(matrices), start.subtracted)
    with _base_alone(model, state) if start.needs_batches else nullcontext(), torch.no_grad():
        gathered = start.gather(matrices, config, _evidence(model, config, start, own, sources))
        config = gathered.config
        factors: dict[str, tuple[Tensor, Tensor] | None] = {}
        for m, matrix in matrices.items():
            if m in gathered.found and m not in gathered.dropped:
                factors[m] = _factors(start, m, matrix, config, gathered.found[m])
    packed = {base_of(own[m]).quantization for m in factors} if start.needs_originals else set()
    return Started(config, factors, start.subtracted, gathered.dropped, next(iter(packed), None))


def _factors(start: Start, name: str, matrix: Matrix, config: LoraConfig, found: Any) -> tuple[Tensor, Tensor]:
    rank = config.rank_of(name)
    scale = scale_of(config.alpha_of(name), rank, config.rslora)
    pairs = [start.factors(Part(name, matrix, rows, rank, scale), found) for rows in matrix.adapted_rows]
    if not all(bool(torch.isfinite(t).all()) for pair in pairs for t in pair):
        raise StateError(
            f"the start of '{name}' has values that are not finite: its weight has some (init={config.init!r})"
        )
    return matrix.factors(pairs)


def _check_kinds(matrices: Mapping[str, Matrix], start: Start, init: str) -> None:
    wrong = next((m for m, matrix in matrices.items() if matrix.kind not in start.kinds), None)
    if wrong is not None:
        kind, last = type(matrices[wrong].module).__name__, wrong.rpartition(".")[2]
        raise TargetError(
            f"'{wrong}' is a {kind}, for which init={init!r} is not defined; it is for layers of kind "
            f"{' and '.join(sorted(start.kinds))}\n  leave it out (exclude=['{last}']), or use another init"
        )


def _restored(config: LoraConfig, matrices: Mapping[str, Matrix], ranks: Mapping[str, int], start: Start) -> Started:
    """Return a start without values, of the ranks that a checkpoint has."""
    per_part = {m: ranks[m] // len(matrix.adapted_rows) for m, matrix in matrices.items() if m in ranks}
    dropped = {m: "it had no rank when the run began" for m in matrices if m not in ranks}
    if any(rank != config.rank_of(m) for m, rank in per_part.items()):
        config = redistributed(config, per_part)
    return Started(config, dict.fromkeys(per_part), start.subtracted, dropped)


def _without_values(matrices: Mapping[str, Matrix]) -> bool:
    """Whether the model has shapes only, for `lorakit plan`. Raises StateError for a base that is offloaded."""
    for name, matrix in matrices.items():
        if base_of(matrix.module).device(matrix.module).type == "meta":
            if "_hf_hook" in matrix.module.__dict__:
                raise StateError(
                    f"'{name}' is offloaded, so its weight cannot be read to start from (LoraConfig.init)\n"
                    "  keep this module in memory, or use init='default'"
                )
            return True
    return False


def _evidence(
    model: nn.Module, config: LoraConfig, start: Start, modules: Mapping[str, nn.Module], sources: Sources
) -> Evidence:
    batches = original = None
    if start.needs_batches:
        if sources.batches is None:
            raise ConfigError(
                f"init={config.init!r} is made from the first batches of the training data, and attach was given none\n"
                "  attach(model, config, batches=loader), and loss=lambda model, batch: ... where the model returns no "
                "loss itself"
            )
        given = sources.batches
        # A run knows how many, as it may compute a batch in parts.
        first = list(given()) if callable(given) else list(islice(given, config.init_batches))
        if not first:
            raise ConfigError(
                f"attach(..., batches=...) has no batch, and init={config.init!r} is made from the first of them"
            )
        batches = FirstBatches(model, model if sources.model is None else sources.model, first, sources.loss)
    if start.needs_originals:
        original = originals_of(model, modules, sources.originals)
    return Evidence(batches, original)


@contextmanager
def _base_alone(model: nn.Module, state: State) -> Iterator[None]:
    """Compute with the base alone. Afterwards the model is as it was."""
    before, packed = state.active, quantized(model) if not state.adapters else {}
    if state.adapters:
        set_active(model, state, {})
    for module in packed.values():
        base_of(module).prepare(module)  # some would change their storage for good when they are evaluated
    try:
        with undisturbed(model):
            yield
    finally:
        for module in packed.values():
            base_of(module).restore(module)
        if state.adapters:
            set_active(model, state, before)
