"""Find the parts of a transformer by what they are: the keys and values of its attentions, the output projections of
attention and of the feed-forward.

An attention has linears for query, key and value among its children (`_QKV`), or one for all three: it projects the
model's width to more than itself, and a second linear projects width to width. A feed-forward's output projection is a
linear from the inner width back to the model's, whose inputs another linear of the same layer makes (of twice the width
where one half gates the other).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from .bases import base_of
from .expert_weight import ExpertWeight
from .multihead import MultiheadLayer
from .swap import is_linear, mixin_for

_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
)
Names = Mapping[str, nn.Module]


def ia3_targets(names: Names) -> list[str]:
    """Keys, values, and the feed-forwards' output projections (Liu et al. 2022, section 3.3); all three of a projection
    that makes queries, keys and values at once.
    """
    return _in_order(
        names, [*(m for a in attentions(names) for m in _keys_and_values(a, names)), *feedforward_outputs(names)]
    )


def houlsby_targets(names: Names) -> list[str]:
    """The output projections of attention and feed-forward (Houlsby et al. 2019)."""
    return _in_order(names, [*attention_outputs(names), *feedforward_outputs(names)])


def attentions(names: Names) -> list[str]:
    """Return the attentions of a model, by full name."""
    return [name for name in names if name and (_separate(name, names) or _fused(name, names))]


def attention_outputs(names: Names) -> list[str]:
    """Return the output projection of each attention: its last linear to the model's width, or the one beside it."""
    found = []
    for attention in attentions(names):
        made = set(_separate(attention, names) or _fused(attention, names) or ())
        inside = [m for m in _linears(attention, names) if m not in made]
        beside = [m for m in _linears(_parent(attention), names) if not m.startswith(f"{attention}.")]
        width = _sizes(names[next(iter(made))])[0]
        own = [m for m in inside if _sizes(names[m])[1] == width]
        around = [m for m in beside if _sizes(names[m]) == (width, width)]
        found += own[-1:] or around[:1]
    return found


def feedforward_outputs(names: Names) -> list[str]:
    """Return the output projection of the feed-forward of each layer, in the model's order."""
    every = attentions(names)
    found: list[str] = []
    for attention in every:
        block = _parent(attention)
        while block and sum(a.startswith(f"{block}.") and _last(a) == _last(attention) for a in every) == 1:
            own = _outputs_in(
                [m for m in _linears(block, names) if not any(m.startswith(f"{a}.") for a in every)], names
            )
            if own:
                found += own
                break
            block = _parent(block)
    return _in_order(names, found)


def _outputs_in(linears: Sequence[str], names: Names) -> list[str]:
    """Return the linears that take the outputs of one before them back to that one's inputs."""
    sizes = {m: _sizes(names[m]) for m in linears}
    found = []
    for at, m in enumerate(linears):
        size_in, size_out = sizes[m]
        before = [sizes[other] for other in linears[:at]]
        if any(width == size_out and inner in (size_in, 2 * size_in) for width, inner in before):
            found.append(m)
    return found[-1:]


def _separate(name: str, names: Names) -> tuple[str, str, str] | None:
    """The names of an attention's projections to query, key and value."""
    for three in _QKV:
        q, k, v = (f"{name}.{each}" for each in three)
        if all(each in names and _is_plain(names[each]) for each in (q, k, v)):
            return q, k, v
    return None


def _fused(name: str, names: Names) -> tuple[str, ...] | None:
    """The one projection to query, key and value of an attention, of which another is the output projection."""
    if not any(part.isdigit() for part in name.split(".")):
        return None  # in no layer: a head may have such linears too
    own = [m for m in _linears(name, names) if _parent(m) == name]
    for m in own:
        width, made = _sizes(names[m])
        if made > width and any(_sizes(names[other]) == (width, width) for other in own if other != m):
            return (m,)
    return None


def _keys_and_values(attention: str, names: Names) -> Sequence[str]:
    separate = _separate(attention, names)
    return separate[1:] if separate is not None else _fused(attention, names) or ()


def _linears(block: str, names: Names) -> Iterator[str]:
    """The linears inside a module, in the model's order."""
    return (m for m in names if m.startswith(f"{block}.") and _is_plain(names[m]))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear that is called with its input, unlike torch's attention or an expert's weight."""
    mixin = mixin_for(module)
    return (
        is_linear(module)
        and not isinstance(module, ExpertWeight)
        and mixin is not None
        and not issubclass(mixin, MultiheadLayer)
    )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear."""
    first, second = base_of(module).shape(module)[:2]
    mixin = mixin_for(module)
    return (first, second) if mixin is not None and mixin.lora_transposed else (second, first)


def _in_order(names: Names, chosen: Sequence[str]) -> list[str]:
    return [name for name in names if name in {*chosen}]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
