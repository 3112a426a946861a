"""Sets of targets by name, found by what modules are, so that one name fits every UNet, diffusion transformer and text
encoder.

    attention   the linears of attention: to_q, to_k, to_v, to_out.0, add_*_proj; q_proj, k_proj, v_proj, out_proj
    kohya       also feed-forward, and the projections in and out of a stack of such blocks: what kohya's trainer and
                A1111's files call a LoRA (of SD1's UNet 192 modules, of SDXL's 722)
    locon       also convolutions, of residual blocks and of the changes of resolution, and the projections beside them:
                kohya's "conv" (of SD1's UNet 278 modules, of SDXL's 788)
    ia3         keys, values and the feed-forwards' output projections, in `transformer_parts`
    houlsby     the output projections of attention and feed-forward; pfeiffer: of the feed-forward alone

An attention has diffusers' `set_processor`, or query, key and value among its children. A feed-forward is a module
beside an attention with two linears or more, and no norm: the linears of adaptive norms are not among the targets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .conv import ConvLayer
from .swap import is_linear, mixin_for
from .transformer_parts import feedforward_outputs, houlsby_targets, ia3_targets

_QKV = ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"to_q", "to_k", "to_v"})


_OF_PARTS = {"ia3": ia3_targets, "houlsby": houlsby_targets, "pfeiffer": feedforward_outputs}


def preset(name: str, names: Mapping[str, nn.Module], roots: Collection[str]) -> list[str]:
    """Return the modules of a preset, in the model's order; empty if the model has no attention.

    `name`: one of the above; `names`: the model's modules by full name; `roots`: names of whole models
    among them, such as "unet", or "" for the model itself.
    """
    if name in _OF_PARTS:
        return _OF_PARTS[name](names)
    attention = [n for n, module in names.items() if _is_attention(module) and n not in roots]
    # What lies in a processor, such as IP-Adapter's projections, is another adapter's.
    inside = {n for a in attention for n in _below(a, names) if not n.startswith(f"{a}.processor.")}
    chosen = {n for n in {*inside, *attention} if is_linear(names[n])}
    if name != "attention":
        for a in attention:
            chosen |= _beside(a, names, attention)
            chosen |= _around(a, names, roots)
    if name == "locon":
        chosen |= _convolutions(names, roots)
    return [n for n in names if n in chosen]


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return is_linear(module)
    return callable(getattr(module, "set_processor", None)) or any(module._modules.keys() >= three for three in _QKV)


def _beside(attention: str, names: Mapping[str, nn.Module], every: Collection[str]) -> set[str]:
    """The feed-forward of the block that an attention is in; in T5 it is one level further out.

    Linears of the block itself are a feed-forward too (Flux' single blocks).
    """
    outer = _parent(attention)
    for block in (outer, _parent(outer)):
        found = {n for n in _children(block, names) if is_linear(names[n])} if block == outer else set()
        for n in _below(block, names) if block else ():
            inside = [n, *_below(n, names)]
            if any(a in inside or n.startswith(f"{a}.") for a in every):
                continue
            linears = {m for m in inside if _is_pointwise(names[m])}
            if len(linears) > 1 and not any(_is_norm(names[m]) for m in inside):
                found |= linears
        if found:
            return found
    return set()


def _around(attention: str, names: Mapping[str, nn.Module], roots: Collection[str]) -> set[str]:
    """The projections into and out of the stack of blocks that an attention is in, unless that is the whole model."""
    stack = _parent(_parent(attention))
    holder = _parent(stack)
    if not isinstance(names.get(stack), nn.ModuleList) or holder in roots or holder not in names:
        return set()
    return {n for n in _children(holder, names) if _is_pointwise(names[n])}


def _convolutions(names: Mapping[str, Any], roots: Collection[str]) -> set[str]:
    """All that stands beside a convolution of more than one pixel, other than one that cuts a picture into patches."""
    holders = {
        _parent(n)
        for n, module in names.items()
        if _is_conv(module) and not _is_pointwise(module) and module.kernel_size != module.stride
    }
    return {
        n
        for holder in holders - set(roots)
        for n in _children(holder, names)
        if is_linear(names[n]) or _is_conv(names[n])
    }


def _is_conv(module: nn.Module) -> bool:
    mixin = mixin_for(module)
    return mixin is not None and issubclass(mixin, ConvLayer)


def _is_pointwise(module: Any) -> bool:
    """Whether a module is a linear, or the convolution that is one: a kernel of one pixel."""
    return is_linear(module) or (_is_conv(module) and all(size == 1 for size in module.kernel_size))


def _is_norm(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("eps", "variance_epsilon"))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _children(name: str, names: Mapping[str, nn.Module]) -> Iterator[str]:
    for n in _below(name, names):
        if _parent(n) == name:
            yield n


def _below(name: str, names: Mapping[str, nn.Module]) -> Iterator[str]:
    """The full names of all modules inside another, in the model's order."""
    start = f"{name}." if name else ""
    module = names.get(name)
    if module is None:
        yield from (n for n in names if n.startswith(start))
        return
    yield from (start + n for n, _ in module.named_modules() if n and start + n in names)
