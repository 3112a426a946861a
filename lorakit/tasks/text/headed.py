"""What tasks with a trained head on a text model do alike, behind the interface of `tasks/task.py`.

The head (transformers' `score`, `classifier` or `qa_outputs`) is initialized at random from the run's seed, trained in
full and saved with the adapter, as in PEFT (modules_to_save). A task's file imports these names, so that they are its
own, and adds how rows are read and what the loss is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...config import Quantization, RunSettings, part
from ...errors import NotFiniteError, TrainError
from ..task import Base, Data, Item
from .base import (  # noqa: F401 (names of the tasks)
    MARGIN,
    asked,
    blueprint,
    checkpoint,
    compares,
    configure,
    defaults,
    drawn,
    for_run,
    learning_rate,
    loss_labels,
    margin,
    prepare,
    rate_factor,
    recorded,
    samples_from_file,
    save_adapter,
    save_beside,
    shares,
    size_at_once,
    size_unit,
    to_attach,
    traced,
    tried_with,
    unsaved,
    uses_all,
    writes,
)
from .samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401 (names of the tasks)
from .settings import Columns, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...data.fields import RowSet
    from ...data.parse import Row


# ------------------------------------------------------------------------------------- rows


def resolved(config: RunSettings, processor: Any, earlier: Mapping[str, Any]) -> RunSettings:
    from .token_ids import with_token_ids

    return with_token_ids(config, processor)


def rows_of(config: RunSettings, source: str, split: str | None = None) -> list[Row]:
    """Read the rows of a file. Tables without a header have numbered columns."""
    from ...data.read import read_rows

    return read_rows(source, split, columns=part(config, Columns).columns)


def read_parts(config: RunSettings, processor: Any, read: Callable[..., RowSet]) -> tuple[Data, RowSet]:
    """Read the training and the held-out rows. Returns them with the training rows' set.

    read(rows, first): makes a set of rows; `first`: that of the training rows, None for itself.
    """
    from ...data.dataset import held_out_of
    from .held_out import held_out_notes
    from .lengths import check_limit, described
    from .vocabulary import check_vocabulary

    check_limit(config)
    first = read(rows_of(config, config.data, config.split), None)
    counts = {"dropped": first.dropped, "cut": first.cut, "split": first.split}
    length = described(first.lengths, first.max_length, first.max_length_reason, counts, config)
    notes = dict(first.notes)
    if isinstance(config.validation, str):
        other = read(rows_of(config, config.validation), first)
        train, held_out = first.items, other.items
        notes |= held_out_notes(config.validation, other.notes, first.max_length, other.cut, other.dropped)
    else:
        train, held_out = held_out_of(first.items, config.validation)
    check_vocabulary(config, processor, [*train, *held_out])
    shape = f"shape {first.shape}"
    return Data(train, held_out, shape, [("length", length)], first.about, notes), first


def longest_input(config: RunSettings) -> int | None:
    """Return the most tokens of a row to predict: `max_length`, or else the model's positions; None: no limit."""
    from .positions import positions_for

    limit = part(config, Lengths).max_length
    return positions_for(config) if limit == "auto" else int(limit)


def names_of(about: Mapping[str, Any], base: Any) -> list[str]:
    """Return the label names of a result, or those of its base; empty if a base's are only LABEL_0, LABEL_1, ..., which
    transformers writes where there are none.
    """
    if about.get("labels"):
        return list(about["labels"])
    names = [base.id2label[label] for label in sorted(base.id2label)]
    return [] if names == [f"LABEL_{label}" for label in range(len(names))] else names


# ------------------------------------------------------------------------------------- the base


def load_headed(
    config: RunSettings,
    processor: Any,
    auto_class: Any,
    changes: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Load the base with a head. `changes`: fields of the model's config. Raises TrainError for an encoder-decoder."""
    import torch

    from ...bases.load import load_config
    from ...bases.load_head import load_with_head
    from ...data.batches import pad_id
    from .vocabulary import grow_for

    base = load_config(config.model, config.revision, config.trust_remote_code)
    if base.is_encoder_decoder:
        raise TrainError(
            f"{config.model} is an encoder-decoder ({type(base).__name__}); {config.task} needs an encoder or a "
            "decoder\n"
            "  choose another base (--model)"
        )
    torch.manual_seed(config.seed)  # for the new head's initialization
    model = load_with_head(
        auto_class,
        config.model,
        dtype,
        device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        changes=changes,
        trained=getattr(config, "save_modules", ()),
        quantization=part(config, Quantization),
    )
    grow_for(config, model, processor)
    return _configured(model, pad_id(processor))


def skeleton_of(config: RunSettings, base: Any, auto_class: Any, changes: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build the base with its head without loading weights. `base`: its transformers config, which is changed."""
    from .vocabulary import grow_skeleton

    grow_skeleton(config, base)
    for name, value in changes.items():
        setattr(base, name, value)
    model = auto_class.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)
    return _configured(model, 0 if base.pad_token_id is None else base.pad_token_id)


def _configured(model: Any, pad: int) -> Any:
    """Set the padding id, by which a decoder finds each row's last token, and disable the KV cache, which is unused."""
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    model.config.use_cache = False
    return model


def check(config: RunSettings, model: Any, items: Iterable[Item]) -> None:
    from .positions import check_positions

    check_positions(config, model, items)


def check_together(model: Any) -> None:
    """Do nothing: `alone` already keeps these tasks out of sweeps."""


def alone(config: RunSettings) -> str | None:
    return (
        f"task: {config.task} trains a head in full, and a sweep does not train several heads side by side yet\n"
        "  start these runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[Item]]) -> str:
    raise TrainError("a task with a head does not pack rows: a head reads whole sequences, each its own")


def forward(model: Any, batch: Mapping[str, Tensor]) -> Any:
    """Return the model's output for the inputs of a batch: token ids, their mask and segments."""
    return model(**{name: batch[name] for name in INPUTS if name in batch})


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def batches(
    base: Base, items: Sequence[Any], batch_size: int, collate: Callable[..., dict[str, Tensor]]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of similar length and of one group on the model's device, with their items' indices, in eval
    mode.
    """
    import torch

    from ...generate.eval_mode import evaluating

    order = sorted(range(len(items)), key=lambda i: -items[i].size)  # similar lengths together need little padding
    groups = [[i for i in order if items[i].group == group] for group in dict.fromkeys(item.group for item in items)]
    with evaluating(base.model), torch.inference_mode():
        for group in groups:
            for start in range(0, len(group), batch_size):
                chosen = group[start : start + batch_size]
                made = collate([items[i] for i in chosen], base)
                yield chosen, {name: tensor.to(base.model.device) for name, tensor in made.items()}


def check_finite(item: Item, loss: float) -> float:
    """Return the loss of an item. Raises NotFiniteError, naming its row, if it is not finite."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
        )
    return loss


# ------------------------------------------------------------------------------------- samples


def prompts(config: RunSettings, base: Base, data: Data) -> list[Any]:
    return []


def samples(config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[TextSample]:
    return []
