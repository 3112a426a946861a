"""A request in vLLM's form: the body of POST /v1/completions, with token ids in and token ids out.

Every setting is sent, also where it is the default: what a request leaves open, vLLM may fill in from elsewhere.
vLLM passes over fields that it does not know, so that a misspelt one would go unnoticed; the names are those of its
`CompletionRequest`.

Ends: `ignore_eos` leaves the stopping to `stop_token_ids` alone, which are the renderer's, as in the embedded engine.
A schema is different: where the JSON is complete vLLM allows the tokenizer's end token only, and must heed it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from ..engine import Sampling, Work


def stops(sampling: Sampling, ends: Collection[int]) -> frozenset[int]:
    """Return the ids that end this answer and are not part of it. ends: those of the model's own."""
    return sampling.stop_ids if sampling.schema is None else sampling.stop_ids | frozenset(ends)


def body(work: Work, model: str, ends: Collection[int]) -> dict[str, Any]:
    """Return the body. model: vLLM's name of the base, an adapter or a mix."""
    sampling = work.sampling
    made: dict[str, Any] = {
        "model": model,
        "prompt": list(work.ids),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence,
        "frequency_penalty": sampling.frequency,
        "repetition_penalty": sampling.repetition,
        "stop_token_ids": sorted(stops(sampling, ends)),
        "ignore_eos": sampling.schema is None,
    }
    if sampling.seed is not None:
        made["seed"] = sampling.seed
    if sampling.logprobs is not None:
        # "token_id:17" instead of a text: two tokens may have the same text
        made |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.logit_bias:
        made["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.schema is not None:
        made["structured_outputs"] = {"json": json.loads(sampling.schema)}
    return made
