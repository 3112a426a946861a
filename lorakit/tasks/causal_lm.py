"""Causal language modelling: predict each trained token from the tokens before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..config import Quantization, RunSettings, Strict, part
from ..errors import TrainError
from .task import Asked, Base, Data
from .text.base import (  # noqa: F401 (names of the task)
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
)
from .text.causal_rows import Sources
from .text.samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, Lengths, LongContext, Prompts, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.dataset import Item
    from ..data.questions import Question
    from ..data.templates import ChatOptions

DEFAULT_PROMPTS = 2


class Answers(Strict):
    rows: ClassVar = {"train_on", "turns"}
    anew: ClassVar = {"train_on", "turns"}

    train_on: Literal["completion", "all"] = Field(
        "completion", description="train on the answers only, or on all tokens"
    )
    turns: Literal["all", "last"] = Field(
        "all", description="train every answer of a conversation, or only the last one"
    )


class Writing(Answers):
    rows: ClassVar = {"answer_after", "template", "chat_template", "chat_template_kwargs", "date"}
    free: ClassVar = {"chat_template", "date"}  # a resumed run compares the resulting rows by hash

    answer_after: str | None = Field(
        None, description="for rows of one text: what stands before the answer in each, such as 'A:'"
    )
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the tokenizer's template; plain: ours; auto: chat if there is one"
    )
    chat_template: str | None = Field(
        None, description="a file with the chat template (Jinja) to use instead of the model's; saved with the adapter"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further variables of the chat template: {enable_thinking: false}"
    )
    date: str | None = Field(
        None, description="the date that chat templates write, YYYY-MM-DD; default: the day on which the run began"
    )

    @field_validator("date", mode="before")
    @classmethod
    def _date(cls, value: Any) -> Any:
        from ..data.templates import parsed_date

        if value is None:
            return None
        return parsed_date(value if isinstance(value, str) else str(value)).isoformat()  # YAML reads dates itself

    @field_validator("chat_template_kwargs")
    @classmethod
    def _kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        from ..data.templates import check_kwargs

        check_kwargs(value, "chat_template_kwargs")
        return value


class Packing(Strict):
    packing: bool = Field(
        False,
        description="put several rows of a batch into one sequence, each with its own positions and attention: the "
        "same result with less padding",
    )

    @model_validator(mode="after")
    def _not_compiled(self) -> Packing:
        if self.packing and getattr(self, "compile", False):
            raise ValueError("packing is not tested with compile; remove one of the two")
        return self


class CausalSettings(Lengths, LongContext, Packing, Writing, Columns, Sources, Prompts, Sampling):
    pass


settings = CausalSettings
peft_type = "CAUSAL_LM"
summary = "predict the next token (a language model)"
unit = "tokens"
writes = True


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.kind import check_decoder_only
    from .text.vocabulary import load_extended_tokenizer

    check_decoder_only(config.model, blueprint(config))
    return load_extended_tokenizer(config)


def resolved(config: RunSettings, processor: Any, earlier: Mapping[str, Any]) -> RunSettings:
    from .text.dates import dated
    from .text.token_ids import with_token_ids

    return with_token_ids(dated(config, processor, earlier), processor)


def data(config: RunSettings, processor: Any) -> Data:
    from ..bases.load import end_tokens
    from ..data.chat_record import TEMPLATE_FILE, record
    from .text.causal_rows import read_data
    from .text.lengths import check_limit
    from .text.vocabulary import check_vocabulary

    own = part(config, CausalSettings)
    check_limit(config)
    tokenizer, options = chat_tokenizer(own, processor), chat_options(own)
    how = {
        "columns": own.columns or None,
        "template": own.template,
        "train_on": own.train_on,
        "on_long": own.on_long,
        "turns": own.turns,
        "options": options,
        "ends": end_tokens(config.model, config.revision, config.trust_remote_code),
    }
    data, dataset = read_data(config, own, own.max_length, how, tokenizer, own.answer_after)
    check_vocabulary(config, processor, chain(data.train, data.held_out))
    about = record(dataset, tokenizer, options, own.chat_template is not None)
    files = {TEMPLATE_FILE: tokenizer.chat_template} if "chat_template" in about else {}
    facts = [*data.facts]
    if "date" in about:
        facts.append(("date", f"{about['date']}, written by the chat template and saved with the run"))
    if "end_tokens" in about:
        ends = ", ".join(about["end_tokens"])
        facts.append(("ends with", f"{ends}, as the chat template writes; generation stops there"))
    return replace(data, about=about, files=files, facts=facts)


def chat_tokenizer(own: Writing, processor: Any) -> Any:
    """Return the tokenizer with the run's chat template."""
    from ..data.templates import read_template, with_template

    path = own.chat_template
    return processor if path is None else with_template(processor, read_template(path), path)


def chat_options(own: Writing) -> ChatOptions:
    from ..data.templates import ChatOptions

    return ChatOptions(own.chat_template_kwargs, own.date)


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    """The default, for rows that no task recognizes. It says yes where an answer's label may make it a preference, so
    that a run says which it is: undesirable answers are not to be imitated.
    """
    from ..data.preferences import may_be_preference

    return may_be_preference(row, rows)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from ..bases.load import load_model, stop_at
    from .text.kind import check_decoder_only
    from .text.vocabulary import grow_for

    check_decoder_only(config.model, blueprint(config))
    model = load_model(
        config.model,
        dtype,
        device,
        config.revision,
        config.trust_remote_code,
        part(config, Quantization),
        rope_scaling=part(config, CausalSettings).rope_scaling,
    )
    grow_for(config, model, processor)
    stop_at(model, processor.convert_tokens_to_ids(list(data.about.get("end_tokens", ()))))
    return model


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from .text.kind import check_decoder_only
    from .text.vocabulary import grow_skeleton

    check_decoder_only(config.model, base)
    grow_skeleton(config, base)
    return AutoModelForCausalLM.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)


def check(config: RunSettings, model: Any, items: Iterable[Item]) -> None:
    from .text.packed import check_packing
    from .text.positions import check_positions

    check_positions(config, model, items)
    if packs(config):
        check_packing(model)


def check_together(model: Any) -> None:
    """Raise TrainError if the output layer is adapted: it sees trained positions, without the rows they belong to."""
    from ..layers.layer import LoraLayer

    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise TrainError(
            "the targets include the output layer, which gets trained positions rather than rows, so runs cannot share "
            "its forward pass\n"
            "  remove it from the targets, or start these runs one by one with lorakit train"
        )


def alone(config: RunSettings) -> str | None:
    return None


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return part(config, CausalSettings).packing


def saved_padding(batches: Sequence[Sequence[Item]]) -> str:
    from .text.packed import saved_padding

    return saved_padding([[item.size for item in batch] for batch in batches])


def collate(items: Sequence[Item], base: Base, packed: bool = False) -> dict[str, Tensor]:
    from ..data.batches import collate, pad_id
    from ..data.packing import collate_packed

    return (collate_packed if packed else collate)(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    """Return rows of token 0, of which the last `share` is trained; packed: two of them in each sequence."""
    import torch

    from ..ops import IGNORE_INDEX

    ids = torch.zeros(rows, size, dtype=torch.long)
    labels = ids.clone()
    labels[:, : min(size - 1, round((1 - share) * size))] = IGNORE_INDEX
    if not packed:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    row = torch.arange(rows)[:, None].expand(rows, size)
    positions = torch.arange(size).repeat(rows, 1)
    pairs = rows if rows == 1 else 2  # `data.packing.sequences` makes none that cost more than such pairs
    whole = -(-rows // pairs) * pairs
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "row": row}
    batch = {name: each[torch.arange(whole) % rows].reshape(-1, pairs * size) for name, each in batch.items()}
    return batch | {"sizes": torch.full((rows,), size)}


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from .text.causal_loss import row_losses

    return row_losses(model, batch)


def evaluate(base: Base, items: Sequence[Item], batch_size: int) -> dict[str, float]:
    from ..data.batches import pad_id
    from .text.perplexity import perplexity

    measured = perplexity(base.model, items, pad_id(base.processor), batch_size)
    return {"loss": measured.loss, "perplexity": measured.perplexity}


def asked(base: Base, items: Sequence[Item]) -> list[Asked]:
    from .text.prompts_of import prompts_of

    return prompts_of(items, base.processor)


def to_predict(config: RunSettings, processor: Any) -> list[Question]:
    """Read questions, in the run's template: `template: chat` and `plain` take a prompt for a user's turn."""
    from ..bases.load import end_tokens
    from ..data.questions import Question, read_questions
    from ..data.read import read_rows
    from ..data.render import Renderer
    from ..data.split_text import answered, without_text

    own = part(config, CausalSettings)
    rows = read_rows(config.data, config.split, columns=own.columns)
    asked = [*answered(rows, own.answer_after, own.columns)]
    columns = without_text(own.columns) if own.answer_after else own.columns
    examples = read_questions(asked, columns, as_turns=own.template != "auto")
    ends = end_tokens(config.model, config.revision, config.trust_remote_code)
    renderer = Renderer(chat_tokenizer(own, processor), own.template, options=chat_options(own), ends=ends)
    return [Question(renderer.prompt(example), row) for example, row in zip(examples, rows, strict=True)]


def predict(config: RunSettings, base: Base, items: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    """Return {"answer": text} for each row; "cut": true where `sample_tokens` ended it."""
    from .text.answers import answers

    return answers(config, base, items, batch_size)


# ------------------------------------------------------------------------------------- samples


def prompts(config: RunSettings, base: Base, data: Data) -> list[Asked]:
    """Return the configured prompts in the data's template, or those of the first held-out rows.

    Held-out rows are used if they have a prompt and the model has positions left for an answer.
    """
    from ..data.render import question_ids
    from ..generate.generate import check_prompts, positions_of

    own = part(config, CausalSettings)
    if own.sample_tokens == 0:
        return []
    if own.sample_prompts:
        tokenizer, options = chat_tokenizer(own, base.processor), chat_options(own)
        ids = [question_ids(text, tokenizer, data.about["template"], options) for text in own.sample_prompts]
        check_prompts(base.model, ids, own.sample_tokens, [f"sample prompt {text!r}" for text in own.sample_prompts])
        return [Asked(i, text, (), "sample_prompts") for text, i in zip(own.sample_prompts, ids, strict=True)]
    positions = positions_of(base.model)
    room = math.inf if positions is None else positions - own.sample_tokens
    chosen: list[Asked] = []
    for item in data.held_out:
        prompt = item.ids[: item.prompt_length]
        if 0 < len(prompt) <= room and prompt not in [p.ids for p in chosen]:
            chosen.append(Asked(prompt, base.processor.decode(prompt), (), item.where))
        if len(chosen) == DEFAULT_PROMPTS:
            break
    return chosen


def samples(config: RunSettings, base: Base, prompts: Sequence[Asked]) -> list[TextSample]:
    """Generate one answer per prompt."""
    from .text.answers import sampled

    return sampled(config, base, prompts)
