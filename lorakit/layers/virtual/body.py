"""The body of a transformers model (`model.base_model`: all below its head) with virtual tokens in front of each row.

A row of q tokens becomes n + q positions inside the body. What is called outside stays as it is: masks, positions,
labels and hidden states are of the q tokens. A key-value cache holds the n positions too, from the first call on.

    attention_mask   [rows, past + q]   n ones in front
    position_ids     [rows, q]          + n, as virtual tokens have the positions 0 to n - 1. Where none are given and
                                        there is a mask, they are counted from each row's first token, so that a row is
                                        computed as it is without padding on its left
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...adapter.virtual_tokens import BODY
from ...bases.pipeline import PipelineModel
from ...errors import StateError, TargetError
from ..layer import LoraLayer

if TYPE_CHECKING:
    from .tokens import VirtualUpdate

# transformers 5.24 renamed `past_key_values` to `cache`.
CACHES = ("cache", "past_key_values")
_MARK = "lorakit_virtual_tokens"  # of a cache: the adapter whose virtual tokens it holds, and how many


def body_of(model: nn.Module) -> nn.Module:
    """Return the body of a transformers language model. Raises TargetError for one that cannot have virtual tokens."""
    if isinstance(model, PipelineModel) or not hasattr(model, "base_model_prefix"):
        raise TargetError(
            f"virtual tokens stand in front of a text's tokens, and this {type(model).__name__} is no language model "
            "of transformers\n  adapt its modules instead: variant='lora'"
        )
    body: Any = model.get_submodule(BODY)
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise TargetError(
            f"{type(model).__name__} is an encoder-decoder, for which lorakit has no virtual tokens: PEFT's prefix is "
            "in front of the decoder's tokens alone, while the papers have one for the encoder too\n"
            "  use variant='lora', or PEFT"
        )
    if model.config.get_text_config() is not model.config:  # type: ignore[union-attr, operator]
        raise TargetError(
            f"{type(model).__name__} has other inputs than text, among which virtual tokens have no place yet\n"
            "  use variant='lora'"
        )
    return body


@cache
def names_of(forward: Any) -> tuple[str, ...]:
    """Return the names of a forward's parameters, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def is_decoder(config: Any) -> bool:
    """Whether a token of such a model attends to the tokens before it alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.model_type
    return bool(getattr(config, "is_decoder", False)) or (kind in CAUSAL and kind not in MASKED)


class Call:
    """One call of the body's own forward, by the names of its parameters."""

    def __init__(self, body: BodyLayer, args: tuple[Any, ...], given: dict[str, Any]):
        self.names = names_of(type(body).lora_probed)
        self.inputs = {**dict(zip(self.names, args, strict=False)), **given}
        self.cache_name = next((name for name in CACHES if name in self.names), None)
        for name in CACHES:  # the older name is still accepted
            if name != self.cache_name and self.cache_name and self.inputs.get(name) is not None:
                self.inputs[self.cache_name] = self.inputs.pop(name)
        ids, vectors = self.inputs.get("input_ids"), self.inputs.get("inputs_embeds")
        given_tokens = ids if vectors is None else vectors
        if given_tokens is None:
            raise StateError("the model was called without input_ids and inputs_embeds\n  give one of them")
        self.rows, self.length = given_tokens.shape[:2]
        use = self.inputs.get("use_cache")
        self.uses_cache = bool(getattr(body.config, "use_cache", False) if use is None else use)

    @property
    def cache(self) -> Any:
        return self.inputs.get(self.cache_name) if self.cache_name else None

    def past(self, child: str, n: int) -> int | None:
        """Return the number of the row's own tokens in the cache; None if nothing is in it yet.

        Raises StateError for a cache that does not hold these virtual tokens.
        """
        cache = self.cache
        if cache is None:
            return None
        if getattr(cache, "is_compileable", False):
            raise StateError(
                f"a {type(cache).__name__} has room for a fixed number of positions, and its masks are made before the "
                "virtual tokens are in it\n  omit cache_implementation: generate's own default cache grows"
            )
        seen = int(cache.get_seq_length())
        if not seen:
            return None
        if cache.__dict__.get(_MARK) != (child, n):
            raise StateError(
                f"this cache was filled without the {n} virtual tokens that are active now\n"
                "  start with an empty cache after activate(...)"
            )
        return seen - n

    def mark(self, cache: Any, child: str, n: int) -> None:
        if cache is not None and hasattr(cache, "__dict__"):
            cache.__dict__[_MARK] = (child, n)

    def extend(self, n: int, past: int | None, in_front: bool, body: BodyLayer) -> None:
        """Make mask, positions and token types those of n positions more. `in_front`: whether the virtual tokens are
        inputs of this call, rather than in the cache. Raises StateError for inputs that virtual tokens do not go with.
        """
        decodes = body.lora_decodes
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        total = (past or 0) + self.length
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != total:
                shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise StateError(
                    f"attention_mask is {shape}; with virtual tokens, one of [rows, tokens so far] = [{self.rows}, "
                    f"{total}] is expected, without them"
                )
            self.inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), n), mask], 1)
        elif positions is not None and self.cache is None and decodes and _is_packed(positions):
            raise StateError(
                "position_ids that start again within a row are packed rows, and virtual tokens would stand in front "
                "of the first alone\n  do not pack rows (omit packing)"
            )
        if mask is not None and body.lora_window and n + total > body.lora_window and bool((mask[:, 0] == 0).any()):
            raise StateError(
                f"padding on the left, between virtual tokens and a row's own: its layers see {body.lora_window} "
                "positions back (sliding_window), so a padded row would see less of the virtual tokens than it does "
                "alone\n  give rows of one length at a time, or pad on the right"
            )
        if positions is None and mask is not None and decodes and "position_ids" in self.names:
            padding = (mask != 0).cumsum(1).eq(0).sum(1, keepdim=True)  # [rows, 1], on the left
            at = torch.arange(total - self.length, total, device=mask.device)
            positions = (at - padding).clamp_min(0)  # [rows, q]
        if positions is not None:
            positions = positions + n
            if in_front:
                own = torch.arange(n, device=positions.device).expand(len(positions), n)
                positions = torch.cat([own, positions], 1)
            self.inputs["position_ids"] = positions
        types = self.inputs.get("token_type_ids")
        if types is not None and in_front:
            if decodes:
                raise StateError("token_type_ids with virtual tokens: these have no type\n  omit token_type_ids")
            self.inputs["token_type_ids"] = torch.cat([types.new_zeros(len(types), n), types], 1)


def _check_unmarked(inputs: Mapping[str, Any]) -> None:
    """Raise StateError for a cache that virtual tokens are in, where none are active."""
    held = next((each for name in CACHES if (each := inputs.get(name)) is not None), None)
    if held is not None and _MARK in getattr(held, "__dict__", {}) and held.get_seq_length():
        raise StateError(
            "this cache was filled with virtual tokens, and none are active now\n"
            "  start with an empty cache after activate(...)"
        )


def _is_packed(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) != 1).any())


class BodyLayer(LoraLayer):
    """The mixin in front of the body's class."""

    if TYPE_CHECKING:
        config: Any
    lora_name = BODY
    lora_decodes: bool  # whether a token attends to those before it alone
    lora_window: int  # how far back its layers see, 0 if not limited

    @classmethod
    def lora_class_attributes(cls, base: type[nn.Module]) -> dict[str, object]:
        # transformers keeps what a model can record (hidden states, attentions) by its class's qualified name.
        return {"__qualname__": base.__qualname__}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own_forward = super(LoraLayer, self).forward
        found = self.lora_virtual()
        if found is None:
            _check_unmarked(kwargs)
            return own_forward(*args, **kwargs)
        child, update = found
        call = Call(self, args, kwargs)
        past = call.past(child, update.rank)
        call.extend(update.rank, past, past is None and update.in_front, self)
        if past is not None:
            return own_forward(**call.inputs)
        tuples = call.inputs.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        fills = update.put_in(self, call)
        output = update.taken_out(own_forward(**call.inputs, return_dict=True), call)
        holds = next((value for name, value in output.items() if name in CACHES), None)
        if fills or call.uses_cache:
            call.mark(holds, child, update.rank)
        return output.to_tuple() if tuples else output

    def lora_virtual(self) -> tuple[str, VirtualUpdate] | None:
        """Return the active virtual tokens with their child's name. Raises StateError for a weight other than 1."""
        if self.lora_route is not None or self.lora_merged is not None:
            return None
        active = [(name, weight) for name, weight in self.lora_active if weight != 0]
        if not active:
            return None
        if len(active) > 1 or active[0][1] != 1:
            raise StateError("virtual tokens of one adapter can be active at a time, with weight 1")
        return active[0][0], self._modules[active[0][0]]

    def lora_embedding(self) -> nn.Module:
        """Return the embedding of its tokens."""
        embedding: nn.Module = self.get_input_embeddings()  # type: ignore[operator]
        return embedding

    def lora_adopted(self) -> None:
        self.lora_decodes = is_decoder(self.config)
        self.lora_window = _window(self.config) if self.lora_decodes else 0

    def lora_released(self) -> None:
        del self.__dict__["lora_decodes"], self.__dict__["lora_window"]


def _window(config: Any) -> int:
    """Return the smallest sliding window of a decoder's layers; 0 if there is none."""
    from transformers.cache_utils import DynamicCache

    sizes = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return min((int(size) for size in sizes if size), default=0)


def virtual_tokens_of(model: Any) -> int:
    """Return the number of virtual tokens that a model puts in front of each row now."""
    body = getattr(model, BODY, None)
    found = body.lora_virtual() if isinstance(body, BodyLayer) else None
    return 0 if found is None else found[1].rank
