"""Run the model on the rows of a batch, each with its own adapters, inside `lorakit.route`.

`Runner(model)` refuses what it could not decode right. What a model does with a mask and positions is tried on it, not
guessed from its class: see `_try`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...errors import LorakitError, StateError
from ...generate.decode import cache_name, supports
from ...generate.generate import positions_of
from ...layers.virtual.body import virtual_tokens_of
from ...model.route import route
from ...model.state import STATE
from ..engine import BASE, Sampling, Work
from ..errors import Cannot
from .masks import ADDED, BOOLEAN, kinds_of, masks
from .request import Request
from .slots import Slots

if TYPE_CHECKING:
    from ..engine import Choice

log = logging.getLogger(__name__)

Per = Literal["row", "token"]
# Where a model's positions have no end of their own.
DEFAULT_CONTEXT = 8192
_ELSEWHERE = "  use it with `lorakit generate`, or serve it with --engine vllm"


class Flattened(Exception):
    """Prompts cannot be prefilled together: perhaps an adapted module gets the tokens of all rows in one axis."""


class Runner:
    """A model in evaluation mode. `context`: positions for prompt and answer; `vocabulary`: its tokens.

    one_by_one: prompts must be prefilled one at a time, with a choice for each token, as the model hands the tokens of
    all rows to an adapted module in one axis (shared experts of Qwen2-MoE). It is found out when a prompt can be
    prefilled so, and not otherwise.
    """

    def __init__(self, model: Any, context: int | None = None):
        """Check that the model can be decoded in slots. Raises LorakitError if not."""
        self.model, self.body = model, model.base_model
        self.name = type(model).__name__
        model.eval()
        kinds = kinds_of(model) if supports(model) else None
        if kinds is None:
            raise LorakitError(
                f"{self.name} cannot be served by the embedded engine: it is no decoder that caches only keys and "
                f"values of a row, over all positions or a sliding window\n{_ELSEWHERE}"
            )
        self.kinds = kinds
        self.how = model.config.get_text_config(decoder=True)._attn_implementation
        if self.how not in (BOOLEAN, ADDED):
            raise LorakitError(
                f"{self.name} was loaded with the attention '{self.how}', which takes no mask of its own for each row\n"
                f"  load it with attn_implementation='{BOOLEAN}'"
            )
        if virtual_tokens_of(model):
            raise LorakitError(
                "the base has virtual tokens attached, which would stand in front of every request\n"
                "  detach them: lorakit.detach(model)"
            )
        positions = _usable(model, positions_of(model), context)
        self.context = min(n for n in (context or positions or DEFAULT_CONTEXT, positions) if n is not None)
        self.layers = len(model.config.get_text_config(decoder=True).per_layer_config)
        embedding = model.get_input_embeddings().weight
        self.vocabulary, self.dtype, self.device = embedding.shape[0], model.dtype, embedding.device
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._cache_names = {part: cache_name(part) for part in (self.model, self.body)}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.one_by_one = False
        self._routable: dict[Choice, str | None] = {}
        self._try()

    def slots(self, rows: int) -> Slots:
        """Return slots without a row, for up to `rows`."""
        return Slots(self.layers, rows, self.context)

    def prefill(self, slots: Slots, ids: Sequence[Sequence[int]]) -> None:
        """Feed tokens to the rows of `slots`. ids: equally many for each, padded on the right.

        Raises Flattened where rows cannot be fed together: prefill them one at a time. What raises StateError then
        too is the row's own mistake.
        """
        if self.one_by_one and len(ids) > 1:
            raise Flattened
        choices = [request.choice for request in slots.rows]
        if not self.one_by_one:
            try:
                self._feed(self.body, slots, ids, choices)
                return
            except StateError as error:
                if len(ids) > 1:
                    raise Flattened(str(error)) from error
        self._feed(self.body, slots, ids, choices * len(ids[0]), per="token")
        self.one_by_one = True

    def step(self, slots: Slots) -> Tensor:
        """Feed each row its last token. Return the logits of the next, [rows, vocab] in float32."""
        choices = [request.choice for request in slots.rows]
        out = self._feed(self.model, slots, [[request.ids[-1]] for request in slots.rows], choices)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def check(self, choice: Choice) -> None:
        """Raise Cannot if a row cannot use these adapters, which must be attached, with these weights."""
        if choice and choice not in self._routable:
            problem = None
            try:
                with self._routed([choice]):
                    pass
            except StateError as error:
                problem = str(error)
            while len(self._routable) >= 4096:
                del self._routable[next(iter(self._routable))]
            self._routable[choice] = problem
        if choice and (problem := self._routable[choice]) is not None:
            raise Cannot(problem, "mix" if len(choice) > 1 else "scale")

    def _feed(
        self, part: Any, slots: Slots, ids: Sequence[Sequence[int]], choices: Sequence[Choice], per: Per = "row"
    ) -> Any:
        width = len(ids[0])
        slots.begin(width)
        tokens = torch.tensor(ids, device=self.device)
        positions = slots.index(self.device)[1]
        fresh = slots.longest == width
        name = self._cache_names[part]
        assert name is not None, "`supports` found it"
        inputs: dict[str, Any] = {name: slots.cache, "position_ids": positions}
        if not fresh:
            inputs["attention_mask"] = masks(self.kinds, positions, slots.longest, self.how, self.dtype)
        if part is self.model and self._keeps_logits:
            inputs["logits_to_keep"] = 1
        with self._routed(choices, per):
            out = part(input_ids=tokens, use_cache=True, **inputs)
        slots.end()
        return out

    def _routed(self, choices: Sequence[Choice], per: Per = "row") -> AbstractContextManager[None]:
        state = self.model.__dict__.get(STATE)
        if state is None or not state.adapters:
            return nullcontext()
        return route(self.model, [_named(choice) for choice in choices], per=per)

    def _try(self) -> None:
        """Raise LorakitError unless rows of different lengths get the logits that each gets alone, without a cache."""
        prompts = [[(13 * n + 7 * length) % self.vocabulary for n in range(length)] for length in (3, 8)]
        slots = Slots(self.layers, 2, 16)
        for ids in prompts:
            slots.append(Request(Work(tuple(ids), BASE, Sampling(max_tokens=2)), BASE), None, 0)
        allowed = 1e-3 if self.dtype == torch.float32 else 0.05  # of the largest logit; a wrong mask changes it by more
        with torch.inference_mode():
            try:
                self.prefill(slots, [row.ids[:-1] + row.ids[-1:] * (8 - len(row.ids)) for row in slots.rows])
                slots.lengths = [row.fed for row in slots.rows]  # without the padding
                for _ in range(2):
                    logits = self.step(slots)
                    with self._routed([BASE]):
                        alone = [self.model(input_ids=self._ids(r.ids), use_cache=False) for r in slots.rows]
                    expected = torch.cat([out.logits[:, -1].float() for out in alone])
                    error = float((logits - expected).abs().max() / expected.abs().max())
                    if not error <= allowed:
                        raise LorakitError(
                            f"{self.name} cannot be served by the embedded engine: rows of different lengths in one "
                            f"batch get other logits than each alone (by {error:.2g} of the largest)\n{_ELSEWHERE}"
                        )
                    for row, token in zip(slots.rows, expected.argmax(-1).tolist(), strict=True):
                        row.ids.append(token)
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                if isinstance(error, LorakitError):
                    raise
                raise LorakitError(
                    f"{self.name} cannot be served by the embedded engine: it does not take a mask for each row "
                    f"({type(error).__name__}: {error})\n{_ELSEWHERE}"
                ) from error

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)


def _usable(model: Any, positions: int | None, context: int | None) -> int | None:
    """Return the positions that a row can have without changing what others in its batch are given.

    LongRoPE (Ding et al. 2024) has two sets of frequencies, and transformers takes those for long texts for all rows
    of a batch if one of them is long. Raises LorakitError if `context` is longer than the short ones reach.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one for each kind of layer
    short = [each["original_max_position_embeddings"] for each in every if each.get("rope_type") == "longrope"]
    if not short or (positions is not None and positions <= min(short)):
        return positions
    name, most = type(model).__name__, min(short)
    if context is not None and context > most:
        raise LorakitError(
            f"the context is {context}, and beyond {most} positions {name} computes all rows of a batch with other "
            f"frequencies (LongRoPE), so that answers would depend on what else runs\n"
            f"  serve it with --context {most}, or with --engine vllm"
        )
    if context is None:
        log.warning(
            "%s is served with a context of %d: beyond it a row's frequencies (LongRoPE) depend on its batch. "
            "--engine vllm serves all %s positions",
            name,
            most,
            positions,
        )
    return most


def _named(choice: Choice) -> str | dict[str, float] | None:
    """A choice as `route` takes it. Adapters are attached under their keys."""
    if not choice:
        return None
    return choice[0][0] if choice == ((choice[0][0], 1.0),) else dict(choice)
