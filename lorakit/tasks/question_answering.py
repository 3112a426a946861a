"""Extractive question answering: find the answer to a question in a text, with a head on the base.

    loss = −(log p_start(first token) + log p_end(last token)) / 2, averaged over windows
    p_start, p_end: softmax over a window's tokens of the head's two outputs

The head is transformers' `qa_outputs` (`text/headed.py`). Long contexts are overlapping windows (`data/answers.py`).
A prediction is the span with the largest p_start(i)·p_end(j), i ≤ j, over all windows of a row; where rows without an
answer were learnt, it is the empty text if p_start(0)·p_end(0) is larger in every window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from ..config import Auto, RunSettings, at_least_one, part
from ..data.columns import OF_LANGUAGE_MODELS
from .task import Base, Data
from .text import headed
from .text.headed import (  # noqa: F401 (names of the task)
    alone,
    asked,
    base_samples,
    blueprint,
    check,
    check_together,
    checkpoint,
    compares,
    configure,
    defaults,
    drawn,
    for_run,
    learning_rate,
    loss_labels,
    margin,
    packs,
    prepare,
    prompts,
    rate_factor,
    read_samples,
    recorded,
    resolved,
    samples,
    samples_from_file,
    save_adapter,
    save_beside,
    saved_padding,
    shares,
    size_at_once,
    size_unit,
    to_attach,
    traced,
    tried_with,
    unsaved,
    uses_all,
    write_samples,
    writes,
)
from .text.settings import Columns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.answers import QuestionItem, WindowItem


class QuestionAnsweringSettings(Columns):
    rows: ClassVar = {"window", "stride", "no_answer"}

    window: int | Auto = Field(
        "auto", description="tokens of a question and a part of its context; auto: the 99th percentile, at most 384"
    )
    stride: int = Field(128, ge=0, description="tokens that the windows of a long context share, a third at most")
    no_answer: bool | Auto = Field(
        "auto", description="whether questions may have no answer; auto: if some of the data's have none"
    )

    _window = field_validator("window")(at_least_one)


settings = QuestionAnsweringSettings
peft_type = "QUESTION_ANS"
summary = "find the answer to a question in a text"
unit = "windows"
MAX_ANSWER = 30  # tokens of a predicted answer, as in SQuAD's baselines


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def data(config: RunSettings, processor: Any) -> Data:
    from transformers import AutoModelForQuestionAnswering

    from ..bases.load_head import trunk_names
    from ..data.answers import read_questions
    from .text.positions import positions_for

    own = part(config, QuestionAnsweringSettings)

    def read(rows: Any, first: Any) -> Any:
        return read_questions(
            rows,
            processor,
            columns=own.columns,
            window=own.window if first is None else first.max_length,
            stride=own.stride if first is None else first.about["stride"],
            no_answer=own.no_answer if first is None else first.about["no_answer"],
            positions=positions_for(config),
        )

    made, _ = headed.read_parts(config, processor, read)
    names = trunk_names(AutoModelForQuestionAnswering, blueprint(config))
    return replace(made, about={**made.about, **({"key_mapping": names} if names else {})})


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Rows with SQuAD's answers. Those with an `answer` may be to generate."""
    if isinstance(row.get("paragraphs"), list):
        return True
    answers = row.get("answers")
    own = {"question", "context"} <= row.keys() and isinstance(answers, Mapping) and "answer_start" in answers
    return own and not OF_LANGUAGE_MODELS & row.keys()


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {name: about[name] for name in ("no_answer", "window", "stride") if name in about}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForQuestionAnswering

    return headed.load_headed(config, processor, AutoModelForQuestionAnswering, {}, dtype, device)


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForQuestionAnswering

    return headed.skeleton_of(config, base, AutoModelForQuestionAnswering, {}, dtype)


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[WindowItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    from ..data.answers import collate_windows
    from ..data.batches import pad_id

    return collate_windows(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    import torch

    ids, zeros = torch.ones(rows, size, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "start_positions": zeros,
        "end_positions": zeros.clone(),
    }


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return _losses(*_logs(model, batch), batch)


def _logs(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return log p_start and log p_end: [windows, tokens]; minus infinity on padding."""
    made, padding = headed.forward(model, batch), batch["attention_mask"] == 0
    start, end = (
        logits.float().masked_fill(padding, -math.inf).log_softmax(1) for logits in (made.start_logits, made.end_logits)
    )
    return start, end


def _losses(start: Tensor, end: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    firsts = start.gather(1, batch["start_positions"][:, None])[:, 0]
    lasts = end.gather(1, batch["end_positions"][:, None])[:, 0]
    return -(firsts + lasts) / 2  # [windows]


@dataclass(frozen=True)
class Span:
    """A window's best answer. `first`, `last`: tokens; `log`: log p_start(first) + log p_end(last), minus infinity in a
    window of spaces alone, which has none; `empty`: that of no answer.
    """

    first: int
    last: int
    log: float
    empty: float


def best_span(start: Tensor, end: Tensor, item: WindowItem) -> Span:
    """Return the best span of the context, of at most MAX_ANSWER tokens. `start`, `end`: log p of a window's tokens."""
    import torch

    own = torch.tensor(
        [i for i, span in enumerate(item.offsets) if span is not None and span[0] < span[1]], dtype=torch.long
    )
    empty = float(start[0] + end[0])
    if not len(own):
        return Span(0, 0, -math.inf, empty)
    firsts, lasts = start[own].cpu(), end[own].cpu()
    scores = firsts[:, None] + lasts[None]  # [first, last]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(MAX_ANSWER - 1)
    best = int(scores.masked_fill(~allowed, -math.inf).argmax())
    first, last = divmod(best, len(own))
    return Span(int(own[first]), int(own[last]), float(scores[first, last]), empty)


def evaluate(base: Base, items: Sequence[WindowItem], batch_size: int) -> dict[str, float]:
    """Return the mean loss of a window, and exact match and F1 (0 to 100) over questions, as SQuAD's script has them.

    Raises NotFiniteError if a window's loss is not finite.
    """
    from ..data.answers import rows_of
    from .metrics.spans import answer_f1, exact_match

    total, spans = 0.0, {}
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        start, end = _logs(base.model, batch)
        for row, (i, loss) in enumerate(zip(chosen, _losses(start, end, batch).tolist(), strict=True)):
            total += headed.check_finite(items[i], loss)
            spans[i] = best_span(start[row], end[row], items[i])
    questions = [(items[row[0]], _answer(items, spans, row)["answer"]) for row in rows_of(items)]
    return {
        "loss": total / len(items),
        "exact_match": 100 * sum(exact_match(text, item.answers) for item, text in questions) / len(questions),
        "answer_f1": 100 * sum(answer_f1(text, item.answers) for item, text in questions) / len(questions),
    }


def _answer(items: Sequence[WindowItem], spans: Mapping[int, Span], row: Sequence[int]) -> dict[str, Any]:
    """Return the best answer over the windows of a row."""
    best = max(row, key=lambda i: spans[i].log)
    empty = min(spans[i].empty for i in row)
    nothing = spans[best].log == -math.inf  # no token of the context is a word's
    if nothing or (items[best].may_be_empty and empty > spans[best].log):
        return {"answer": "", "score": round(math.exp(empty), 6), "start": None, "end": None}
    first, last = (items[best].offsets[place] for place in (spans[best].first, spans[best].last))
    assert first is not None
    assert last is not None
    text = items[best].context[first[0] : last[1]]
    return {"answer": text, "score": round(math.exp(spans[best].log), 6), "start": first[0], "end": last[1]}


# ------------------------------------------------------------------------------------- predictions


def to_predict(config: RunSettings, processor: Any) -> list[QuestionItem]:
    from ..data.answers import WINDOW, Windows, read_unanswered
    from .text.positions import positions_for

    own = part(config, QuestionAnsweringSettings)
    window = min(WINDOW, positions_for(config) or WINDOW) if own.window == "auto" else own.window
    rows = headed.rows_of(config, config.data, config.split)
    made = Windows(processor, window, min(own.stride, window // 3), own.no_answer is True)
    return read_unanswered(rows, own.columns, made)


def predict(config: RunSettings, base: Base, items: Sequence[QuestionItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"answer", "score", "start", "end"} for each row: the text, its probability, its place in the context.

    `start`, `end`: characters. An answer that is not there is "" without them.
    """
    windows = [window for item in items for window in item.windows]
    spans = {}
    for chosen, batch in headed.batches(base, windows, batch_size, collate):
        start, end = _logs(base.model, batch)
        for row, i in enumerate(chosen):
            spans[i] = best_span(start[row], end[row], windows[i])
    places = iter(range(len(windows)))
    return [_answer(windows, spans, list(islice(places, len(item.windows)))) for item in items]
