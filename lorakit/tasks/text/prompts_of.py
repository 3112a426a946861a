"""The prompts of a language model's rows, each with all the right answers that the rows have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ..task import Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...data.dataset import Item


def prompts_of(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, references_column: str = "references"
) -> list[Asked]:
    """Return the distinct prompts in order of appearance, each with the distinct answers in its rows.

    Raises DataError for a row without a prompt.
    """
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        start = item.prompt_length
        if start == 0:
            raise DataError(
                f"{item.row.where}: the row has no prompt to generate from; all of a plain text is trained\n"
                "  leave generation out, or give rows with prompt and completion"
            )
        groups.setdefault(tuple(item.ids[:start]), []).append(item)
    prompts = []
    for ids, rows in groups.items():
        answers = [answer for item in rows for answer in _answers(item, tokenizer, references_column)]
        prompts.append(Asked(list(ids), _text(tokenizer, ids), tuple(dict.fromkeys(answers)), rows[0].row.where))
    return prompts


def _answers(item: Item, tokenizer: PreTrainedTokenizerBase, references_column: str) -> list[str]:
    start = item.prompt_length
    end = next((i for i in range(start + 1, len(item.ids)) if not item.trained[i]), len(item.ids))
    listed = item.row.values.get(references_column) or []
    return [
        _text(tokenizer, item.ids[start:end]),
        *(text.strip() for text in ([listed] if isinstance(listed, str) else listed)),
    ]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()
