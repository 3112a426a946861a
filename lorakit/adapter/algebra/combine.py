"""Several adapters combined into one, module by module.

linear, cat       Σ wᵢ ΔWᵢ by concatenation: exact, the ranks add up           (task arithmetic, Ilharco et al. 2023)
svd               the same, truncated to its first singular values
ties              Yadav et al. 2023: trim, elect signs, mean of the elements that agree
dare_linear       Yu et al. 2024: drop at random, rescale, add
dare_ties         Yu et al. 2024: drop at random, rescale, then TIES' election
magnitude_prune   trim each, add

All act on ΔW, never on A and B separately. The last four give a matrix of full rank, which is truncated to `rank`
singular values, by default the largest rank of the adapters. docs/algebra.md says how PEFT's methods of the same names
differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...bases.rope import RECORD, recorded
from ...errors import AdapterError, ConfigError, did_you_mean, listing
from ..adapter import Adapter
from ..dense import Dense
from ..fingerprint import ONLY_ON, components_in, of_components
from ..lora import Factors, FactorShapes
from ..update import Update
from .compatible import Saved, check_have_changes, check_same_base, combine_values, needed_quantization
from .compose import compose, relative
from .concatenate import WeightedUpdate, common_factor_shapes, exact_sum
from .dare import dare_linear, dare_ties, drop
from .product import norm
from .reform import with_updates
from .resize import ModuleResize, Resized
from .svd import Svd, distance, matrix_svd, needed, norm_squared
from .ties_merging import Majority, magnitude_prune, ties

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
EXACT = ("linear", "cat", "svd")


@dataclass(frozen=True)
class _Options:
    """The options of `combined` that concern each module's ΔW."""

    method: Method
    rank: int | None
    keep: float | None
    density: float
    majority: Majority
    seed: int


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, method: Method = "linear", **options
) -> Adapter:
    """Combine adapters into one. Default weight: 1 each. Options and errors: see `combined`."""
    return combined(adapters, weights, method, **options).adapter


def combined(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    *,
    rank: int | None = None,
    keep: float | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    saved: Saved = "equal",
    force: bool = False,
    on_module: Callable[[str, int, int], None] | None = None,
) -> Resized:
    """Combine adapters; return the result and its distance from the method's ΔW (0 for an exact sum that was not
    truncated).

    rank, keep: truncate each module to `rank` singular values, or to those that hold the share `keep` of the energy.
    density: the share of elements that ties, dare and magnitude_prune keep, in (0, 1].
    majority: TIES elects signs by "total" magnitude or by "frequency". seed: of DARE's random masks.
    saved: saved weights and embeddings must be "equal", or their weighted "mean" is taken.
    force: combine adapters of different bases. on_module(name, done, total): called after each module.

    A module that only some adapters have is combined among those. Raises ConfigError for options that make no sense,
    AdapterError for different bases or shapes, for differing saved weights, and for a DoRA.
    """
    weights = _checked(adapters, weights, method, rank, keep, density)
    check_have_changes(adapters)
    options = _Options(method, rank, keep, density or 1.0, majority, seed)
    if not force:
        check_same_base(adapters)
    saved_weights = combine_values("saved weight", [a.saved for a in adapters], weights, saved)
    embeddings = combine_values("embedding", [a.embeddings for a in adapters], weights, saved)
    modules = list(dict.fromkeys(m for a in adapters for m in a.updates))
    only_on, scaling = needed_quantization(adapters), recorded(a.metadata for a in adapters)
    result: dict[str, Update] = {}
    reports = []
    for done, module in enumerate(modules, start=1):
        weighted = {
            i: (w, a.updates[module])
            for i, (w, a) in enumerate(zip(weights, adapters, strict=True))
            if module in a.updates
        }
        result[module], report = _combine_module(module, weighted, options)
        reports.append(report)
        if on_module is not None:
            on_module(module, done, len(modules))
    metadata: dict[str, Any] = {
        "combined": {
            "method": method,
            "weights": list(weights),
            **({"density": density} if density is not None else {}),
        }
    }
    for fact in ("model", "spelling"):  # of the same kind of file: how to write the result
        found = [a.metadata.get(fact) for a in adapters]
        if found[0] is not None and all(value == found[0] for value in found):
            metadata[fact] = found[0]
    metadata |= {} if only_on is None else {ONLY_ON: only_on}
    metadata |= {} if scaling is None else {RECORD: scaling}
    prints = [a.metadata["fingerprint"] for a in adapters if a.metadata.get("fingerprint")]
    if prints:
        parts = {name: part for each in reversed(prints) for name, part in components_in(each).items()}
        metadata["fingerprint"] = of_components(parts) if parts else prints[0]
    first = replace(adapters[0], saved=saved_weights, embeddings=embeddings, metadata=metadata)
    config = first.config.replace(save_modules=list(dict.fromkeys(s for a in adapters for s in a.config.save_modules)))
    return Resized(with_updates(first, result, config=config).check(), tuple(reports))


def _checked(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    keep: float | None,
    density: float | None,
) -> list[float]:
    """Check the options; return the weights as floats. Raises ConfigError for an unknown method, or options that do not
    fit it.
    """
    if method not in get_args(Method):
        known = ", ".join(get_args(Method))
        raise ConfigError(
            f"there is no method '{method}' to combine adapters{did_you_mean(method, get_args(Method))}\n"
            f"  known: {known}"
        )
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters or len(weights) != len(adapters):
        raise ConfigError(
            f"{len(adapters)} adapters and {len(weights)} weights; expected at least one adapter, and a weight for each"
        )
    if not all(math.isfinite(w) for w in weights) or not any(weights):
        raise ConfigError(f"the weights are {weights}; expected finite numbers, not all of them 0")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected at least 1")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; expected more than 0 and at most 1")
    if method in EXACT and density is not None:
        raise ConfigError(
            f"'{method}' drops nothing, so it has no density\n"
            "  leave out density (--density); it is for ties, dare_linear, dare_ties, magnitude_prune"
        )
    if method not in EXACT and (density is None or not 0 < density <= 1):
        raise ConfigError(
            f"'{method}' needs a density, the share of each ΔW to keep, more than 0 and at most 1 (got "
            f"{density})\n"
            "  for example density=0.5 (--density 0.5)"
        )
    return weights


def _combine_module(
    module: str, by_adapter: Mapping[int, WeightedUpdate], options: _Options
) -> tuple[Update, ModuleResize]:
    """Combine one module's updates. `by_adapter`: the adapter's index -> its weight and update."""
    stack = next((u for _, u in by_adapter.values() if u.matrices() is not None), None)
    if stack is not None:
        return _combine_stacks(module, stack, by_adapter, options)
    weighted = list(by_adapter.values())
    if options.method not in EXACT:
        return _merged(
            module, weighted, lambda deltas: _merge(deltas, module, by_adapter, options), options.rank, options.keep
        )
    total = exact_sum(module, weighted)
    rank = (
        _largest(weighted)
        if options.method == "svd" and options.rank is None and options.keep is None
        else options.rank
    )
    if not (rank or options.keep):
        return total, _unchanged(module, total)
    return _truncated(module, total, weighted, rank, options.keep)


def _combine_stacks(
    module: str, stack: Update, by_adapter: Mapping[int, WeightedUpdate], options: _Options
) -> tuple[Update, ModuleResize]:
    """Combine updates of a stack of matrices (experts), matrix by matrix. `stack`: one of them."""
    parts = {i: (w, u.matrices()) for i, (w, u) in by_adapter.items()}
    counts = {None if each is None else len(each) for _, each in parts.values()}
    if len(counts) > 1:
        raise AdapterError(
            f"'{module}' is a stack of other sizes in the adapters ({listing(map(str, counts))} matrices)\n"
            "  are they for the same base?"
        )
    combined = [
        _combine_module(f"{module}.{e}", {i: (w, each[e]) for i, (w, each) in parts.items() if each}, options)
        for e in range(counts.pop() or 0)
    ]
    total = stack.of_matrices([update for update, _ in combined])
    return total, ModuleResize.of_stack(module, [report for _, report in combined], total.rank)


def _merge(deltas: list[Tensor], module: str, by_adapter: Mapping[int, WeightedUpdate], options: _Options) -> Tensor:
    """Merge ΔW by `ties`, `magnitude_prune`, `dare_linear` or `dare_ties`. `deltas`: one per adapter, of one shape."""
    weights = [weight for weight, _ in by_adapter.values()]
    if options.method == "ties":
        return ties(deltas, weights, options.density, options.majority)
    if options.method == "magnitude_prune":
        return magnitude_prune(deltas, weights, options.density)
    sparse = [
        drop(delta, options.density, options.seed, module, i) for delta, i in zip(deltas, by_adapter, strict=True)
    ]
    return (
        dare_linear(sparse, weights)
        if options.method == "dare_linear"
        else dare_ties(sparse, weights, options.majority)
    )


def _merged(
    module: str,
    weighted: list[WeightedUpdate],
    merge: Callable[[list[Tensor]], Tensor],
    rank: int | None,
    keep: float | None,
) -> tuple[Update, ModuleResize]:
    """Return the method's ΔW as low-rank factors. A norm's or a bias's change has none and stays dense."""
    if not any(u.is_matrix for _, u in weighted):
        vectors = [[u.tensors()[name] for _, u in weighted if name in u.tensors()] for name in ("weight", "bias")]
        if any(len(v) not in (0, len(weighted)) for v in vectors):
            raise AdapterError(
                f"'{module}' changes its bias in some of the adapters and its weight in others\n"
                "  only method='linear' (--method linear) can add them"
            )
        weight, bias = (merge([t.float() for t in v]) if v else None for v in vectors)
        return Dense(weight, bias), _unchanged(module, Dense(weight, bias))
    _refuse_biases(module, weighted)
    shapes = common_factor_shapes(module, weighted)
    W = merge([u.matrix(shapes.weight_transposed) for _, u in weighted])
    most = rank or (None if keep is not None else _largest(weighted))
    svds = [matrix_svd(rows, most, keep) for rows in _rows(W, shapes)]
    return _composed(module, shapes, svds, most, keep, W)


def _composed(
    module: str, shapes: FactorShapes, svds: list[Svd], rank: int | None, keep: float | None, W: Tensor
) -> tuple[Factors, ModuleResize]:
    """Return low-rank factors of W [out, in·k], from its SVDs, and their error."""
    count = max(min(rank or len(c.S), len(c.S) if keep is None else needed(c.S, c.total, keep)) for c in svds)
    made = compose(shapes, svds, max(count, 1))
    error, size = distance(W, made.B.flatten(1) * made.scale, made.A.flatten(1)), norm_squared(W)
    return made, ModuleResize(
        module, min(W.shape), made.rank, math.sqrt(error / size) if size else 0.0, math.sqrt(size)
    )


def _truncated(
    module: str, total: Update, weighted: list[WeightedUpdate], rank: int | None, keep: float | None
) -> tuple[Update, ModuleResize]:
    """Truncate an exact sum to a lower rank. A norm's or a bias's change stays dense."""
    if not total.is_matrix:
        return total, _unchanged(module, total)
    factors = total.factors
    if factors is None:
        _refuse_biases(module, weighted)
        shapes = common_factor_shapes(module, weighted)
        W = total.matrix(shapes.weight_transposed)
        return _composed(module, shapes, [matrix_svd(W, rank, keep)], rank, keep, W)
    svds = total.singular_values()
    count = max(min(rank or len(s.S), len(s.S) if keep is None else needed(s.S, s.total, keep)) for s in svds)
    if count >= total.rank:
        return total, _unchanged(module, total)
    made = compose(total.factor_shapes(module), svds, max(count, 1), total.scale, dtype=factors.A.dtype)
    return made, ModuleResize(module, total.rank, made.rank, *relative(total, made))


def _rows(W: Tensor, shapes: FactorShapes) -> list[Tensor]:
    """Return [W], or the rows of each adapted part of a packed projection."""
    if not shapes.parts:
        return [W]
    return [rows for rows, adapted in zip(W.chunk(len(shapes.parts)), shapes.parts, strict=True) if adapted]


def _largest(weighted: list[WeightedUpdate]) -> int:
    return max(u.rank for _, u in weighted)


def _unchanged(module: str, update: Update) -> ModuleResize:
    """Return the report on an update that was not truncated."""
    bias = update.tensors()["bias"].double() if update.changes_bias else torch.zeros(1)
    return ModuleResize(module, update.rank, update.rank, 0.0, math.hypot(norm(update), float(bias.norm())))


def _refuse_biases(module: str, weighted: list[WeightedUpdate]) -> None:
    if any(u.changes_bias for _, u in weighted):
        raise AdapterError(
            f"'{module}' changes its bias too, which low-rank factors cannot hold\n"
            "  method='linear' (--method linear) without "
            "rank or keep adds it exactly; or resize first, with drop_bias=True (--drop-bias)"
        )
