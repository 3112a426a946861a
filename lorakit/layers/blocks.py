"""Whole blocks as one autograd node: a gated MLP, an attention's projections and attention, an RMSNorm. Less time and memory in training.

`attach` gives a block its class as it gives an adapted linear its own (see `swap`), `detach` takes it back. A block stands in only for
code it knows (see `recognise`) and only where gradients are made; whatever else is the case (a cache, an attention mask, hooks on a
child, several active adapters, torch.compile), it calls its own class's forward. While B is zero, forward values have the base's bits either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.attention import rope_attention
from ..ops.gated_mlp import GELU_TANH, SILU, Activation, gated_mlp
from ..ops.linear import needs_plain
from ..ops.projections import Projection, project
from ..ops.rms_norm import rms_norm
from .frozen import is_hooked
from .layer import LoraLayer, Swapped
from .linear import makes_gradients, projection_of
from .recognise import digest
from .swap import adapted_class, mixin_and_base, rebind_hooked_forward
from .walk import base_modules

# Digests of forwards (transformers 5.23; that of RMSNorm and the gated MLP is shared by over a hundred models each).
_GATED_MLP = {"f7ba12b452dcc0e0"}  # LlamaMLP
_RMS_NORM = {"02929a6552374ab7"}  # LlamaRMSNorm
_ATTENTION = {"55fba2d365f41f69", "ccfa4ece55e75839", "72db32c093408f23", "67c0b93b08dc0d1c"}  # Llama, Mistral, Qwen2, Qwen3
_ROPE = {"apply_rotary_pos_emb": "3c049039f49b8efe", "rotate_half": "4101eb5ea9abdc78"}  # what the attention calls

_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.activation.SiLU": SILU,
    "transformers.activations.SiLUActivation": SILU,
    "transformers.activations.GELUTanh": GELU_TANH,
}

# Arguments of an attention's forward that do not change what it computes.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "num_items_in_batch", "output_hidden_states"}


class Block(Swapped):
    """A module that computes its children's work itself where it can."""


class GatedMlpBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        act = _activation(self.act_fn) if makes_gradients(self) else None  # type: ignore[attr-defined, arg-type]
        found = _projections(self, x, ("gate_proj", "up_proj", "down_proj")) if act is not None else None  # type: ignore[arg-type]
        if found is None or act is None:
            return super().forward(x)  # type: ignore[misc]
        (gate, up, down), dropout = found
        return gated_mlp(x, gate, up, down, act, dropout)


class AttentionBlock(Block):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None or past_key_values is not None or not self._usable(hidden_states, kwargs):
            return super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )  # fmt: skip
        assert position_embeddings is not None
        q, k, v = self._inputs(hidden_states)
        cos, sin = (t.unsqueeze(2) for t in position_embeddings)  # [rows or 1, length, 1, size]
        out = rope_attention(q, k, v, cos, sin, self.scaling)  # type: ignore[attr-defined]
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None  # type: ignore[attr-defined]

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """q, k and v, each [rows, length, heads, size], from one node where their linears allow it."""
        names = ("q_proj", "k_proj", "v_proj")
        found = _projections(self, x, names)  # type: ignore[arg-type]
        three = project(x, found[0], found[1]) if found is not None else [getattr(self, name)(x) for name in names]
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in three)  # type: ignore[attr-defined]
        if hasattr(self, "q_norm"):  # Qwen3
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[attr-defined]
        return [q, k, v]

    def _usable(self, x: Tensor, kwargs: dict[str, object]) -> bool:
        return (
            makes_gradients(self)  # type: ignore[arg-type]
            and x.device.type == "cpu"  # the kernel whose backward is replaced is the CPU's
            and x.dim() == 3
            and x.shape[1] > 1
            and self.config._attn_implementation == "sdpa"  # type: ignore[attr-defined]
            and _is_own_sdpa(mixin_and_base(type(self))[1].forward)
            and torch.backends.cuda.flash_sdp_enabled()  # `sdpa_kernel` may ask for another, on a CPU too
            and bool(self.is_causal)  # type: ignore[attr-defined]
            and not (self.training and self.attention_dropout)  # type: ignore[attr-defined]
            and all(name in _HARMLESS or value is None or (value is False and name != "is_causal") for name, value in kwargs.items())
            and not torch.is_autocast_enabled("cpu")
            and not needs_plain()
        )


class RmsNormBlock(Block):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        if (
            not hidden_states.requires_grad
            or not torch.is_grad_enabled()
            or weight.requires_grad
            or hidden_states.dtype == torch.float64
            or needs_plain()
        ):
            return super().forward(hidden_states)  # type: ignore[misc]
        return rms_norm(hidden_states, weight, self.variance_epsilon)  # type: ignore[attr-defined]


def adopt(model: nn.Module) -> None:
    """Give every block that is known, and holds or stands beside adapted linears, its class."""
    for _, module in base_modules(model):
        mixin = None if isinstance(module, Block) or "forward" in module.__dict__ else _mixin_for(type(module))
        if mixin is not None and (mixin is RmsNormBlock or any(isinstance(child, LoraLayer) for child in module.children())):
            module.__class__ = adapted_class(mixin, type(module))  # type: ignore[arg-type]


def release(model: nn.Module) -> None:
    """Give every block its own class back."""
    for _, module in base_modules(model):
        if isinstance(module, Block):
            module.__class__ = mixin_and_base(type(module))[1]  # type: ignore[assignment]
            rebind_hooked_forward(module)


def has_attention(model: nn.Module) -> bool:
    """Whether its attention has a block, which makes its backward for short rows on a CPU cheap."""
    return any(isinstance(module, AttentionBlock) for _, module in base_modules(model))


def _mixin_for(cls: type[nn.Module]) -> type[Block] | None:
    name, forward = cls.__name__, cls.forward
    if name.endswith("RMSNorm") and digest(forward) in _RMS_NORM:
        return RmsNormBlock
    if name.endswith("MLP") and digest(forward) in _GATED_MLP:
        return GatedMlpBlock
    if name.endswith("Attention") and digest(forward) in _ATTENTION:
        called = forward.__globals__  # type: ignore[attr-defined]
        if all(f in called and digest(called[f]) == expected for f, expected in _ROPE.items()):
            return AttentionBlock
    return None


def _activation(module: nn.Module) -> Activation | None:
    kind = type(module)
    act = _ACTIVATIONS.get(f"{kind.__module__}.{kind.__name__}")
    if act is GELU_TANH and not isinstance(module.__dict__.get("act"), functools.partial):  # transformers' "gelu_python_tanh"
        return None
    return act if not is_hooked(module) else None


def _is_own_sdpa(forward: Callable) -> bool:
    """Whether "sdpa" still means transformers' own function; it may be replaced there."""
    interfaces = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]  # type: ignore[attr-defined]
    return interfaces["sdpa"].__module__ == "transformers.integrations.sdpa_attention"


def _projections(block: nn.Module, x: Tensor, names: tuple[str, ...]) -> tuple[list[Projection], float] | None:
    """The block's linears for one node and the dropout they share, or None: nothing is adapted there, or something needs its own call."""
    modules = [block._modules[name] for name in names]
    found = [projection_of(m, x) for m in modules if m is not None and not is_hooked(m)]
    if len(found) < len(names) or any(f is None for f in found):
        return None
    dropouts = {dropout for projection, dropout in found if projection.A is not None}  # type: ignore[misc]
    if len(dropouts) != 1:
        return None
    return [projection for projection, _ in found], dropouts.pop()  # type: ignore[misc]
