"""Text out of a model: many prompts in batches (`generate`), or one, piece by piece (`stream`).

Prompts are token ids; the result is text without the prompt, without special tokens, up to the end token or a stop text. Temperature
0 takes the likeliest token each time; otherwise tokens are drawn (see `sampling`). Nothing else of the model's own generation settings
applies (top-k, penalties, beams), save which tokens end a text.

Most decoder-only models are decoded here (see `decode`); encoder-decoder models, and those whose cache is not one of keys and values,
by transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .decode import Decoder, pad_rows, roomy_cache, step, supports
from .eval_mode import evaluating
from .sampling import Pick, picker, random_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not (yet) a character


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """One text for each prompt, in the prompts' order. `on_batch` hears after each batch how many prompts it finished.

    Rows of like length share a batch. Greedy text does not depend on `batch_size`; sampled text does, as the rows of a batch draw
    from one random stream. With a `seed` that stream is private: the global one is left as it was.
    """
    _check_settings(max_new_tokens, batch_size, temperature, top_p, stop)
    check_prompts(model, prompts, max_new_tokens)
    ends = end_ids(model, tokenizer)
    pad = _pad_id(tokenizer, ends)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # longest first: too little memory shows at once
    if supports(model):
        write = partial(_decoded, most=max_new_tokens, ends=ends, pick=picker(temperature, top_p))
    else:
        write = partial(_generated, settings=_settings(max_new_tokens, temperature, top_p, ends, pad))
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.inference_mode(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for row, ids in zip(rows, write(model, tokenizer, [prompts[row] for row in rows], pad, stop)):
                texts[row] = _until(_decode(tokenizer, _before_end(ids, ends)), stop)
            if on_batch is not None:
                on_batch(len(rows))
    return texts


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The text of one prompt as it is made, in pieces of whole characters; joined they are what `generate` returns (if greedy).

    The model is in evaluation mode from the first piece to the last. Encoder-decoder models give their text in one piece.
    """
    _check_settings(max_new_tokens, 1, temperature, top_p, stop)
    check_prompts(model, [prompt], max_new_tokens)
    return _pieces(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, stop)


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, names: Sequence[str] | None = None
) -> None:
    """Every prompt has tokens, and leaves room for the new ones in the model's positions. `names`: what to call the rows in errors."""
    positions = positions_of(model)
    room = None if positions is None else positions - (0 if model.config.is_encoder_decoder else max_new_tokens)
    if prompts and room is not None and room < 1:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, but the model has {positions} positions for prompt and new tokens together\n  lower it"
        )
    for row, prompt in enumerate(prompts):
        name = names[row] if names else f"prompts[{row}]"
        if len(prompt) == 0:
            raise DataError(
                f"{name} is empty: there is nothing to go on from\n  expected at least one token; the model's start token will do"
            )
        if room is not None and len(prompt) > room:
            raise DataError(
                f"{name} has {len(prompt)} tokens, and {max_new_tokens} new ones are wanted; the model has {positions} positions\n"
                f"  shorten the prompt to {room} tokens or lower max_new_tokens"
            )


def positions_of(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for; None where they are relative (T5)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings (some models have several)."""
    settings = getattr(model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *several] if token is not None})


# ------------------------------------------------------------------------------------------ batches


def _decoded(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], pad: int, stop: Sequence[str], *, most: int, ends: Sequence[int], pick: Pick
) -> list[list[int]]:
    """The new ids of each row, its end token included; a row leaves the batch when it ends."""
    made: list[list[int]] = [[] for _ in prompts]
    decoder = Decoder(model, prompts, pad, most)
    rows = list(range(len(prompts)))  # those still in the batch
    while True:
        tokens = pick(decoder.logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            made[row].append(token)
        going = [made[row][-1] not in ends and not _stopped(tokenizer, made[row], stop) for row in rows]
        if len(made[rows[0]]) == most or not any(going):
            return made
        if not all(going):
            now = decoder.keep(going)
            rows, tokens = [rows[place] for place in now], tokens[now]
        decoder.step(tokens)


def _generated(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], pad: int, stop: Sequence[str], *, settings: dict[str, Any]
) -> list[list[int]]:
    """The same by transformers, with whatever stands behind the end token."""
    on_left = not model.config.is_encoder_decoder
    ids, mask = pad_rows(prompts, pad, on_left)  # [rows, longest]
    given = ids.shape[1] if on_left else 1  # an encoder-decoder's result starts with the decoder's start token
    criteria = [_stops_at(tokenizer, stop, given)] if stop else None
    made = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), stopping_criteria=criteria, use_cache=True, **settings
    )  # [rows, given + new]
    return made[:, given:].tolist()


def _settings(max_new_tokens: int, temperature: float, top_p: float, ends: list[int], pad: int) -> dict[str, Any]:
    """transformers' generation settings, all that could come from elsewhere set to "off"."""
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {
        **(sampled if temperature > 0 else {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}),  # the defaults: no warning
        "max_new_tokens": max_new_tokens,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": ends or None,
        "pad_token_id": pad,
    }


def _stops_at(tokenizer: Any, stop: Sequence[str], given: int) -> Callable[..., Tensor]:
    """Says of each row whether its new text holds a stop text (transformers' StoppingCriteria is such a function)."""

    def found(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([_stopped(tokenizer, row, stop) for row in ids[:, given:].tolist()], device=ids.device)

    return found


def _stopped(tokenizer: Any, made: list[int], stop: Sequence[str]) -> bool:
    """Whether the last token completed a stop text."""
    if not stop:
        return False
    # A token is at least one byte and a character at most four, so a stop text that just appeared lies within this many tokens.
    text = _decode(tokenizer, made[-4 * max(map(len, stop)) - 4 :])
    return any(s in text for s in stop)


# ------------------------------------------------------------------------------------------ one token after the other


def _pieces(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    stop: Sequence[str],
) -> Iterator[str]:
    if model.config.is_encoder_decoder:
        yield from generate(
            model, tokenizer, [prompt], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        return
    ends = set(end_ids(model, tokenizer))
    made: list[int] = []
    said = 0  # characters given out so far
    with evaluating(model):
        for token in _tokens(model, prompt, max_new_tokens, picker(temperature, top_p, random_source(model.device, seed))):
            if token in ends:
                break
            made.append(token)
            text = _decode(tokenizer, made)
            done = any(s in text for s in stop)
            sure = _until(text, stop) if done else _without_held(text.rstrip(UNFINISHED), stop)
            if len(sure) > said:
                yield sure[said:]
                said = len(sure)
            if done:
                return
    rest = _until(_decode(tokenizer, made), stop)[said:]  # held back for what never came
    if rest:
        yield rest


def _tokens(model: Any, prompt: Sequence[int], most: int, pick: Pick) -> Iterator[int]:
    """New tokens, each fed back; without a key-value cache (some recurrent models) everything is fed again."""
    ids, fed = list(prompt), 0
    cache = roomy_cache(model, len(prompt) + most - 1) if supports(model) else None
    for _ in range(most):
        # Inference mode is entered and left within each step: held across a `yield` it would reach into the caller's own code.
        with torch.inference_mode():
            logits, cache = step(model, torch.tensor([ids[fed:]], device=model.device), cache)
            token = int(pick(logits))
        fed = len(ids) if cache is not None else 0
        ids.append(token)
        yield token


# ------------------------------------------------------------------------------------------ text


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the earliest stop text."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _without_held(text: str, stop: Sequence[str]) -> str:
    """The text without an ending that may grow into a stop text."""
    held = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(held, default=0)]


def _pad_id(tokenizer: Any, ends: list[int]) -> int:
    """Any token serves: padding is masked out, and what stands behind the end token is cut off."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]


def _check_settings(max_new_tokens: int, batch_size: int, temperature: float, top_p: float, stop: Sequence[str]) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}\n  expected at least 1 of each")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}\n  expected 0 (the likeliest token) or a positive number, such as 0.7")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}\n  expected a share above 0 and up to 1 (1: every token)")
    if isinstance(stop, str) or any(not s for s in stop):
        raise ConfigError(f"stop is {stop!r}\n  expected a list of texts, none of them empty")
