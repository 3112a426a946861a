"""Captions as arguments of a pipeline's call: encoded once by its text encoders, or as text where those are trained.

`pipe.encode_prompt` returns a tuple in an order of its own. Which of its results is which argument is found by giving
it marked tensors for `prompt_embeds`, `pooled_prompt_embeds`, masks ... : it returns what it is given, in its order.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...bases.catching import arguments_of
from ...errors import TrainError, listing

ROWS = "[]"  # ends the name of an argument that is a list with a tensor a row (Z-Image), not one tensor
_IS_TENSOR = ("embeds", "mask")  # how the names of encoded prompts end, or with a number behind


@torch.no_grad()
def encode_prompts(pipe: Any, captions: Sequence[str], **options: Any) -> list[dict[str, Tensor]]:
    """Encode captions with the pipeline's text encoders: one dict of call arguments a caption, without the batch's
    dimension. Each can be cached, and does not depend on the captions beside it.

    `options`: further arguments of `pipe.encode_prompt`, such as `max_sequence_length`.

    Raises TrainError if the pipeline has no `encode_prompt`, or returns none of its call's arguments from it.
    """
    if not callable(getattr(pipe, "encode_prompt", None)):
        raise TrainError(
            f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be encoded beforehand\n"
            "  expected a text-to-image pipeline of diffusers"
        )
    names = _result_names(pipe)
    return [_encoded(pipe, caption, names, options) for caption in captions]


def encoding_of(pipe: Any) -> str:
    """Describe what the embeddings of a caption depend on beside the weights of encoders and the tokenizers: the
    pipeline's class, with the prompt template in its code, and how it calls them.
    """
    import diffusers

    arguments = {name: value for name, value in _encoder_arguments(pipe).items() if name != "device"}
    return f"{type(pipe).__name__} of diffusers {diffusers.__version__}, {sorted(arguments.items())}"


def batch_prompts(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the arguments of several captions to those of one call. Shorter prompts are padded; their mask says so.

    Tuples, such as SDXL's `original_size`, stay one if they are equal, and become a list with one a row if not.

    Raises TrainError if prompts of different lengths have no mask.
    """
    batch: dict[str, Any] = {}
    for name in prompts[0]:
        values = [prompt[name] for prompt in prompts]
        if name.endswith(ROWS):
            batch[name.removesuffix(ROWS)] = values
        elif isinstance(values[0], Tensor):
            batch[name] = _padded(name, values, prompts[0])
        else:
            batch[name] = values[0] if isinstance(values[0], tuple) and len(set(values)) == 1 else values
    return batch


def text_prompts(captions: Sequence[str], sizes: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return captions as the call's argument `prompt`: the pipeline encodes them, with gradient.

    `sizes`: each row's `size_arguments`.
    """
    return {"prompt": list(captions), **(batch_prompts(sizes) if sizes else {})}


def size_arguments(
    pipe: Any, original_size: tuple[int, int], crop_top_left: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """Return SDXL's micro-conditioning (Podell et al. 2023, section 2.2) for one picture, {} for pipelines without it.

    `original_size`: (height, width) of the picture's file, before it is scaled; `crop_top_left`: (top, left) of the
    part that is shown, in the scaled picture; `size`: (height, width) of that part.
    """
    sizes = {"original_size": original_size, "crops_coords_top_left": crop_top_left, "target_size": size}
    return {name: tuple(value) for name, value in sizes.items() if name in arguments_of(pipe)}


def take_rows(prompts: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of these rows of a batch of prompts. What is one for the batch stays as it is."""
    taken: dict[str, Any] = {}
    for name, value in prompts.items():
        if isinstance(value, Tensor):
            every = list(rows) == list(range(len(value)))
            taken[name] = value if every else value[torch.tensor(rows, device=value.device)]
        elif isinstance(value, list):
            own = [value[row] for row in rows]
            taken[name] = own[0] if isinstance(own[0], tuple) and len(set(own)) == 1 else own
        else:
            taken[name] = value
    return taken


def row_groups(prompts: Mapping[str, Any], rows: int) -> list[list[int]]:
    """Return the rows that may share a call: those whose arguments for a whole batch are equal."""
    lists = [value for value in prompts.values() if isinstance(value, list) and isinstance(value[0], tuple)]
    groups: dict[Any, list[int]] = {}
    for row in range(rows):
        groups.setdefault(tuple(value[row] for value in lists), []).append(row)
    return list(groups.values())


# ------------------------------------------------------------------------------------- one caption


def _encoded(pipe: Any, caption: str, names: Sequence[str | None], options: Mapping[str, Any]) -> dict[str, Tensor]:
    results = _results(pipe.encode_prompt(**_encoder_arguments(pipe), **{"prompt": [caption], **options}))
    encoded: dict[str, Tensor] = {}
    for name, result in zip(names, results):
        if name is None:
            continue
        if result is None and "mask" in name:  # nothing is padded
            embeds = next(value for key, value in encoded.items() if "mask" not in key)
            encoded[name] = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
        elif isinstance(result, list | tuple):
            encoded[name + ROWS] = result[0]
        elif isinstance(result, Tensor):
            encoded[name] = result[0]
    return encoded


def _padded(name: str, values: Sequence[Tensor], prompt: Mapping[str, Any]) -> Tensor:
    lengths = {len(value) for value in values}
    if len(lengths) == 1:
        return torch.stack(list(values))
    if not any("mask" in other for other in prompt):
        raise TrainError(
            f"prompts of different lengths ({min(lengths)} to {max(lengths)} tokens) have no mask ({name})\n"
            "  encode them with the pipeline's own padding, or pass them as text"
        )
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


# ------------------------------------------------------------------------------------- which result is which


def _result_names(pipe: Any) -> list[str | None]:
    """Name each result of `encode_prompt` as the argument of the pipeline's call that it is; None for the others."""
    asked = inspect.signature(pipe.encode_prompt).parameters
    names = [n for n in arguments_of(pipe) if n in asked and _is_encoded(n)]
    if not names:
        raise TrainError(
            f"{type(pipe).__name__}'s call takes no encoded prompts (prompt_embeds), so they cannot be encoded "
            f"beforehand\n  its arguments: {listing(arguments_of(pipe), 12)}"
        )
    # Whole numbers below 256 are the same in every precision; a mask that is all true may be left out, so it has a 0.
    marks = {name: _mark(name, 2 + i) for i, name in enumerate(names)}
    own = _encoder_arguments(pipe)
    results = _results(pipe.encode_prompt(**{**own, "prompt": None, **marks}))
    found = [next((n for n, mark in marks.items() if _is_same(result, mark)), None) for result in results]
    if not any(found):
        raise TrainError(
            f"{type(pipe).__name__}.encode_prompt returns none of its call's arguments ({listing(names)})\n"
            "  expected it to return encoded prompts that it is given"
        )
    return found


def _is_encoded(name: str) -> bool:
    return not name.startswith("negative_") and name.rstrip("_0123456789").endswith(_IS_TENSOR) and "image" not in name


def _mark(name: str, value: int) -> Tensor:
    if "mask" in name:
        return torch.tensor([[value, value, 0]])
    return torch.full((1, 3) if "pooled" in name else (1, 3, 2), float(value))


def _is_same(result: Any, mark: Tensor) -> bool:
    return isinstance(result, Tensor) and result.shape == mark.shape and torch.equal(result.cpu().to(mark.dtype), mark)


def _results(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _encoder_arguments(pipe: Any) -> dict[str, Any]:
    """Return the arguments for one picture a prompt and no negative prompt, of those that `encode_prompt` has."""
    given: dict[str, Any] = {
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    asked = inspect.signature(pipe.encode_prompt).parameters
    call = arguments_of(pipe)
    # The call cuts prompts at a length of its own, which may be shorter than the default of encode_prompt.
    if "max_sequence_length" in asked and "max_sequence_length" in call:
        given["max_sequence_length"] = call["max_sequence_length"].default
    # Second and third prompts without a default are the first again.
    missing = {n: None for n, p in asked.items() if p.default is inspect.Parameter.empty and n != "prompt"}
    return {**missing, **{name: value for name, value in given.items() if name in asked}}
