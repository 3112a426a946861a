"""Generate text for many prompts in batches (`generate`), or stream it for one (`stream`).

Prompts are token ids. The result is text without the prompt and special tokens, up to the end token or a stop text.
Temperature 0 is greedy decoding; otherwise tokens are sampled (see `sampling`). Of the model's own generation settings
(top-k, penalties, beams) only the end tokens apply.

Most decoder-only models are decoded here (see `decode`). Encoder-decoder models, and models that cache more than keys
and values, are left to transformers' `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .decode import Decoder, pad_rows, preallocated_cache, step, supports
from .eval_mode import evaluating
from .sampling import Pick, picker, random_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # tokenizers decode bytes that are not (yet) a character to this


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int | None = None,
    stop: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[int], None] | None = None,
    inputs: Callable[[Sequence[int], Tensor], Mapping[str, Tensor]] | None = None,
) -> list[str]:
    """Return one text for each prompt, in the prompts' order.

    prompts: token ids. top_p: probability mass to sample from. beams: the width of a beam search, which is greedy
    decoding with several candidates (by transformers, for every model). seed: samples repeatably and leaves torch's
    global random state unchanged; None samples from the global state. stop: texts to end at. on_batch: called after
    each batch with the number of prompts in it. on_cut: called with the index of each prompt whose text the limit of
    new tokens ended, before its end token or a stop text. inputs: returns what the model gets besides ids and mask,
    such as pictures, for the prompts with these indices, whose left-padded ids are given too; then transformers
    decodes.

    Rows of similar length share a batch. Greedy text does not depend on `batch_size`; sampled text does, as the rows of
    a batch draw from the same random generator. Raises ConfigError for a setting out of range, DataError for a prompt
    that is empty or too long.
    """
    _check_settings(max_new_tokens, batch_size, temperature, top_p, stop, beams)
    check_prompts(model, prompts, max_new_tokens)
    ends = end_ids(model, tokenizer)
    pad = _pad_id(tokenizer, ends)
    texts = [""] * len(prompts)
    # longest first: fail at once if memory is short
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    if beams == 1 and supports(model) and inputs is None:
        decode_batch = partial(_decoded, max_new_tokens=max_new_tokens, ends=ends, pick=picker(temperature, top_p))
    else:
        decode_batch = partial(_generated, settings=_settings(max_new_tokens, temperature, top_p, ends, pad, beams))
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.inference_mode(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            more: dict[str, Any] = {} if inputs is None else {"more": partial(inputs, rows)}
            for row, ids in zip(
                rows, decode_batch(model, tokenizer, [prompts[row] for row in rows], pad, stop, **more)
            ):
                text = _decode(tokenizer, _before_end(ids, ends))
                texts[row] = _until(text, stop)
                ended = any(token in ends for token in ids) or texts[row] != text or len(ids) < max_new_tokens
                if on_cut is not None and not ended:
                    on_cut(row)
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
    """Yield the text of one prompt while it is generated, in pieces that never split a character.

    Arguments and errors are those of `generate`, and greedy pieces joined are the text it returns. The model is in
    evaluation mode from the first piece to the last. Encoder-decoder models yield a single piece.
    """
    _check_settings(max_new_tokens, 1, temperature, top_p, stop)
    check_prompts(model, [prompt], max_new_tokens)
    return _stream(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, stop)


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, names: Sequence[str] | None = None
) -> None:
    """Check that no prompt is empty, and that prompt and new tokens fit the model's positions.

    names: what to call the prompts in errors; prompts[i] by default. Raises DataError, or ConfigError if no prompt
    fits.
    """
    positions = positions_of(model)
    room = None if positions is None else positions - (0 if model.config.is_encoder_decoder else max_new_tokens)
    if prompts and room is not None and room < 1:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, but the model has {positions} positions for prompt and new tokens\n"
            "  lower max_new_tokens"
        )
    for row, prompt in enumerate(prompts):
        name = names[row] if names else f"prompts[{row}]"
        if len(prompt) == 0:
            raise DataError(f"{name} is empty\n  expected at least one token; the model's start token will do")
        if room is not None and len(prompt) > room:
            raise DataError(
                f"{name} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}; the model has {positions} "
                "positions\n"
                f"  shorten the prompt to {room} tokens or lower max_new_tokens"
            )


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the model's positions without those of virtual tokens; None if positions are relative."""
    from ..bases.positions import usable_positions
    from ..layers.virtual.body import virtual_tokens_of

    positions = usable_positions(model.config)
    return None if positions is None else positions - virtual_tokens_of(model)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and the one or more of the model's generation config."""
    settings = getattr(model, "generation_config", None)
    from_model = getattr(settings, "eos_token_id", None)
    from_model = from_model if isinstance(from_model, list) else [from_model]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *from_model] if token is not None})


# ------------------------------------------------------------------------------------------ batches


def _decoded(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    pad: int,
    stop: Sequence[str],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    pick: Pick,
) -> list[list[int]]:
    """Decode a batch here. Return each row's new ids, its end token included; finished rows leave the batch."""
    new_ids: list[list[int]] = [[] for _ in prompts]
    decoder = Decoder(model, prompts, pad, max_new_tokens)
    rows = list(range(len(prompts)))  # those still in the batch
    while True:
        tokens = pick(decoder.logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            new_ids[row].append(token)
        active = [new_ids[row][-1] not in ends and not _stopped(tokenizer, new_ids[row], stop) for row in rows]
        if len(new_ids[rows[0]]) == max_new_tokens or not any(active):
            return new_ids
        if not all(active):
            order = decoder.keep(active)
            rows, tokens = [rows[i] for i in order], tokens[order]
        decoder.step(tokens)


def _generated(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    pad: int,
    stop: Sequence[str],
    *,
    settings: dict[str, Any],
    more: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
) -> list[list[int]]:
    """Decode a batch with transformers. The rows may have more ids after the end token."""
    on_left = not model.config.is_encoder_decoder
    ids, mask = pad_rows(prompts, pad, on_left)  # [rows, longest]
    prefix = ids.shape[1] if on_left else 1  # an encoder-decoder's output starts with the decoder's start token
    criteria = [_stops_at(tokenizer, stop, prefix)] if stop else None
    further = {} if more is None else {name: value.to(model.device) for name, value in more(ids).items()}
    output = model.generate(
        **further,
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        stopping_criteria=criteria,
        use_cache=True,
        **settings,
    )  # [rows, prefix + new]
    return output[:, prefix:].tolist()


def _settings(
    max_new_tokens: int, temperature: float, top_p: float, ends: list[int], pad: int, beams: int
) -> dict[str, Any]:
    """Return transformers' generation settings, with everything that the model's own could change switched off."""
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults: no warning
    return {
        **(sampled if temperature > 0 else greedy),
        "max_new_tokens": max_new_tokens,
        "num_beams": beams,
        "length_penalty": 1.0,
        "early_stopping": False,
        "min_length": 0,
        "forced_eos_token_id": None,  # BART's would hide that the limit of new tokens ended a text
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": ends or None,
        "pad_token_id": pad,
    }


def _stops_at(tokenizer: Any, stop: Sequence[str], prefix: int) -> Callable[..., Tensor]:
    """Return a StoppingCriteria for transformers: which rows' text after the first `prefix` ids has a stop text."""

    def criterion(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([_stopped(tokenizer, row, stop) for row in ids[:, prefix:].tolist()], device=ids.device)

    return criterion


def _stopped(tokenizer: Any, new_ids: list[int], stop: Sequence[str]) -> bool:
    """Whether the last token completed a stop text."""
    if not stop:
        return False
    # A token has at least one byte and a character at most four, so these tokens contain any stop text just completed.
    text = _decode(tokenizer, new_ids[-4 * max(map(len, stop)) - 4 :])
    return any(s in text for s in stop)


# ------------------------------------------------------------------------------------------ streaming


def _stream(
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
            model,
            tokenizer,
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        return
    ends = set(end_ids(model, tokenizer))
    new_ids: list[int] = []
    emitted = 0  # characters yielded so far
    pick = picker(temperature, top_p, random_source(model.device, seed))
    with evaluating(model):
        for token in _tokens(model, prompt, max_new_tokens, pick):
            if token in ends:
                break
            new_ids.append(token)
            text = _decode(tokenizer, new_ids)
            stopped = any(s in text for s in stop)
            final = _until(text, stop) if stopped else _without_partial_stop(text.rstrip(UNFINISHED), stop)
            if len(final) > emitted:
                yield final[emitted:]
                emitted = len(final)
            if stopped:
                return
    rest = _until(_decode(tokenizer, new_ids), stop)[emitted:]  # held back for a stop text or character never completed
    if rest:
        yield rest


def _tokens(model: Any, prompt: Sequence[int], max_new_tokens: int, pick: Pick) -> Iterator[int]:
    """Yield new tokens. A model whose cache cannot be handed on (see `step`) gets the entire sequence each time."""
    ids, fed = list(prompt), 0
    # Some hybrids (Bamba) count from zero again in each step unless they are given positions.
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache = preallocated_cache(model, len(prompt) + max_new_tokens - 1) if supports(model) else None
    for _ in range(max_new_tokens):
        # Inference mode must not be held across `yield`: it would apply to the caller's code too.
        with torch.inference_mode():
            new = torch.tensor([ids[fed:]], device=model.device)
            positions = torch.arange(fed, len(ids), device=model.device)[None]
            inputs = {"position_ids": positions} if has_positions else {}
            logits, cache = step(model, new, cache, **inputs)
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
    """Return the text before the earliest stop text."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _without_partial_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text without an ending that may become a stop text."""
    partial_lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(partial_lengths, default=0)]


def _pad_id(tokenizer: Any, ends: list[int]) -> int:
    """Return the pad token, or any token without one: padding is masked, and ids after the end token are cut off."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]


def _check_settings(
    max_new_tokens: int, batch_size: int, temperature: float, top_p: float, stop: Sequence[str], beams: int = 1
) -> None:
    if beams < 1:
        raise ConfigError(f"beams is {beams}\n  expected 1 (no beam search) or more")
    if beams > 1 and temperature > 0:
        raise ConfigError(
            f"beams is {beams}, which searches for the likeliest text, and temperature {temperature:g}, which draws "
            "one\n"
            "  give only one of the two"
        )
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}\n  both must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}\n  expected 0 (greedy) or a positive number, such as 0.7")
    if not 0 < top_p <= 1:
        raise ConfigError(
            f"top_p is {top_p}\n  expected a probability above 0 and up to 1 (1 samples from every token)"
        )
    if isinstance(stop, str) or any(not s for s in stop):
        raise ConfigError(f"stop is {stop!r}\n  expected a list of texts, none of them empty")
