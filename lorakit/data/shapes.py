"""Work out from its columns what a row is: a prompt with its completion, a conversation, or plain text.

    prompt/completion   (TRL)             prompt + completion, as texts or as messages
    alpaca              (Stanford)        instruction, input, output; LLaMA-Factory's system and history
    messages            (OpenAI)          messages: [{role, content}, ...]
    conversations       (ShareGPT)        conversations: [{from, value}, ...]
    text                                  text

All rows of a dataset have the same shape. Whatever the shape, an `Example` is a tuple of messages, each marked as
trained or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lorakit.data import tool_calls, turns
from lorakit.data.parse import Row
from lorakit.data.turns import Message
from lorakit.errors import DataError, did_you_mean, listing

PROMPTS = ("prompt", "question", "input")
COMPLETIONS = ("completion", "response", "answer", "output")

# What a conversation's chat template reads besides its turns. "functions" is OpenAI's older name for tools.
CONTEXT = ("system", "tools", "functions", "documents", "chat_template_kwargs")
# The columns each shape reads. The first shape that fits wins: alpaca files, for one, often have a `text` column too.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *CONTEXT),
    "conversations": ("conversations", *CONTEXT),
    "alpaca": ("instruction", "output", "input", "history", *CONTEXT),
    "prompt/completion": (*PROMPTS, *COMPLETIONS, "references", *CONTEXT),
    "text": ("text",),
}
WEIGHT = "weight"  # of a row, in every shape

ACCEPTED = """accepted shapes:
    prompt/completion   prompt (or question, input) and completion (or response, answer, output);
                        or prompt and references, a list of correct answers
    alpaca              instruction and output; input, system and history are optional
    messages            messages: a list of {"role", "content"}
    conversations       conversations: a list of {"from", "value"}
    text                text"""


@dataclass(frozen=True)
class Example:
    """A row as messages. `references`: all correct answers if the data has several.

    tools, documents, template_kwargs: passed to the chat template. unused: columns that nothing reads.
    """

    kind: Literal["text", "completion", "chat"]
    messages: tuple[Message, ...]
    row: Row
    references: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def read_examples(
    rows: Sequence[Row], columns: Mapping[str, str] | None = None, media: Collection[str] = ()
) -> tuple[str, list[Example]]:
    """Return the shape of `rows` and the examples of those whose weight is not 0.

    columns: our column name -> the file's, as in {"prompt": "question_en"}. media: types of parts besides text that
    the content of a turn may have. Raises DataError, naming file and row.
    """
    if not rows:
        raise DataError("no rows, so no shape; expected at least one")
    columns = dict(columns or {})
    check_columns(columns, rows[0])
    shape = ""
    examples = []
    for row in rows:
        values = _renamed(row, columns)
        try:
            row_shape = _shape_of(values, columns, row)
        except DataError:
            missing = _missing(row, rows)
            if not missing:
                raise
            raise DataError(
                f"{row.where}: no {listing(missing)}, which other rows have\n  complete the row, or remove it"
            ) from None
        if shape and row_shape != shape:
            raise DataError(
                f"{row.where}: its shape is {row_shape} ({listing(row.values)}), but the rows before it are {shape}; "
                "all rows of a dataset must have the same shape"
            )
        shape = row_shape
        if weighs(values, row):
            examples.append(_example(shape, values, row, media))
    if not examples:
        raise DataError(f"{rows[0].file}: every row has {WEIGHT} 0, so there is nothing to train on")
    return shape, examples


def _missing(row: Row, rows: Sequence[Row]) -> list[str]:
    """List the columns that most rows have and this one, which has some of them, lacks."""
    usual, count = Counter(tuple(other.values) for other in rows).most_common(1)[0]
    return [name for name in usual if name not in row.values] if count > 1 and set(usual) & set(row.values) else []


def weighs(values: dict[str, Any], row: Row) -> bool:
    """Whether a row is trained; takes its weight out of `values`. Raises DataError for a weight other than 0 or 1."""
    return values.get(WEIGHT) is None or turns.on_or_off(values.pop(WEIGHT), WEIGHT, row)


def check_columns(columns: Mapping[str, str], first: Row) -> None:
    """Raise DataError for a name that is no column of ours, and for one that the file does not have."""
    ours = list(dict.fromkeys(name for names in COLUMNS.values() for name in names))
    for our, theirs in columns.items():
        if our not in ours:
            raise DataError(
                f"columns: '{our}' is not a column lorakit reads{did_you_mean(our, ours)}\n  known: {', '.join(ours)}"
            )
        if theirs not in first.values:
            raise DataError(
                f"{first.where}: no column '{theirs}' (columns: {our}: {theirs}){did_you_mean(theirs, first.values)}\n"
                f"  columns found: {listing(first.values, 20)}"
            )


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row's values under our names, without nulls."""
    mapped = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in mapped}
    values |= {our: row.values.get(theirs) for our, theirs in columns.items()}
    return {name: value for name, value in values.items() if value is not None}


def _shape_of(values: Mapping[str, Any], columns: Mapping[str, str], row: Row) -> str:
    if {"chosen", "rejected"} <= set(values) and not set(columns.values()) & {"chosen", "rejected"}:
        prompt = next((name for name in (*PROMPTS, "conversations", "messages") if name in values), None)
        fix = f"prompt: {prompt}, completion: chosen" if prompt else "messages: chosen"
        raise DataError(
            f"{row.where}: preference pairs (chosen, rejected), which supervised training cannot use\n"
            "  to learn which answer is better: --task preference\n"
            f"  to train on the chosen answers only, name them: columns: {{{fix}}}"
        )
    # Columns with a value decide. If none fit, null columns count too, so that a null completion is reported as such.
    with_nulls = (set(row.values) - set(columns.values())) | set(columns)
    for names in (set(values), with_nulls):
        for shape, reads in COLUMNS.items():
            if set(columns) <= set(reads) and _fits(shape, names):
                return shape
    file_columns = list(row.values)
    pairs = zip(("prompt", "completion"), file_columns)
    guess = ", ".join(f"{our}: {theirs}" for our, theirs in pairs) if len(file_columns) > 1 else "text: YOUR_COLUMN"
    raise DataError(
        f"{row.where}: unknown shape; columns found: {listing(file_columns, 20) or 'none'}\n"
        f"  {ACCEPTED}\n"
        f"  or map your columns to ours, for example columns: {{{guess}}}"
    )


def _fits(shape: str, names: set[str]) -> bool:
    if shape == "alpaca":
        return {"instruction", "output"} <= names
    if shape == "prompt/completion":
        return bool(names & set(PROMPTS)) and bool(names & {*COMPLETIONS, "references"})
    return shape in names  # messages, conversations and text are named after their column


def _example(shape: str, values: dict[str, Any], row: Row, media: Collection[str]) -> Example:
    """Return a row's example; what it reads it takes out of `values`, so that the rest is known to be unused."""
    if shape == "text":
        text = _non_empty(values, "text", row)
        values.pop("text", None)
        return Example("text", (Message("assistant", text, True),), row, unused=tuple(values))
    if shape == "prompt/completion":
        return _completion(values, row)
    if shape == "alpaca":
        return _chat(_alpaca(values, row), values, row)
    return _chat(turns.conversation(values.pop(shape, None), shape, row, media), values, row)


def _chat(messages: tuple[Message, ...], values: dict[str, Any], row: Row, references: tuple[str, ...] = ()) -> Example:
    """Return the example of a conversation, with what the row's other columns give to its chat template."""
    whole = turns.with_system(messages, _optional(values, "system", row))
    # Without a turn of its own the column's text is in the first one; with one, it must be the same to be used.
    if whole[0].content == values.get("system"):
        values.pop("system")
    found = tool_calls.tools(values.pop("tools", None), row)
    if not found:
        found = tool_calls.tools(values.pop("functions", None), row, "functions")
    documents = tool_calls.objects(values.pop("documents", None), row, "documents")
    kwargs = tool_calls.mapping(values.pop("chat_template_kwargs", None), row, "chat_template_kwargs")
    return Example(
        "chat",
        turns.checked(whole, row),
        row,
        references,
        tools=found,
        documents=tuple(documents),
        template_kwargs=kwargs,
        unused=tuple(values),
    )


def _completion(values: dict[str, Any], row: Row) -> Example:
    prompt = one_of(PROMPTS, values, row)
    references = _references(values, row)
    answer = one_of(COMPLETIONS, values, row) if not references or set(COMPLETIONS) & set(values) else None
    rest = {name: value for name, value in values.items() if name not in (prompt, answer, "references")}
    if answer and isinstance(values.get(prompt), list):
        before = tuple(replace(m, trained=False) for m in turns.conversation(values[prompt], prompt, row))
        after = values.get(answer)
        if isinstance(after, str):  # the text of the assistant's turn
            after = [{"role": "assistant", "content": _non_empty(values, answer, row)}]
        after = [after] if isinstance(after, dict) else after
        return _chat(before + turns.conversation(after, answer, row), rest, row, references)
    completion = _non_empty(values, answer, row) if answer else references[0]
    pair = (Message("user", _text(values, prompt, row), False), Message("assistant", completion, True))
    return Example("completion", pair, row, references, unused=tuple(rest))


def _alpaca(values: dict[str, Any], row: Row) -> tuple[Message, ...]:
    """Return the history's turns, the instruction (a blank line and the input appended, if any), and the output."""
    messages = []
    history = values.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)
    if not pairs:
        raise DataError(f"{row.where}: history is expected to be a list of [instruction, answer] pairs")
    for index, (question, answer) in enumerate(history):
        messages.append(Message("user", turns.string(question, f"history[{index}][0]", row), False))
        messages.append(Message("assistant", turns.string(answer, f"history[{index}][1]", row), True))
    parts = (_text(values, "instruction", row), _optional(values, "input", row))
    question = "\n\n".join(part for part in parts if part)
    if not question.strip():
        raise DataError(f"{row.where}: instruction and input are both empty")
    answer = _non_empty(values, "output", row)
    for name in ("history", "instruction", "input", "output"):
        values.pop(name, None)
    return (*messages, Message("user", question, False), Message("assistant", answer, True))


def one_of(names: Sequence[str], values: Mapping[str, Any], row: Row) -> str:
    """Return the one of `names` that this row has a value for, or failing that a null. Raises DataError for several."""
    candidates = [name for name in names if name in values] or [name for name in names if name in row.values]
    if not candidates or names[0] in candidates:
        return names[0]
    if len(candidates) > 1:
        raise DataError(
            f"{row.where}: {' and '.join(candidates)} could each be the {names[0]}\n"
            f"  say which: columns: {{{names[0]}: {candidates[0]}}}"
        )
    return candidates[0]


def _references(values: Mapping[str, Any], row: Row) -> tuple[str, ...]:
    references = values.get("references", [])
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list | tuple):
        raise DataError(f"{row.where}: references is expected to be a list of texts, not {type(references).__name__}")
    texts = tuple(turns.string(text, f"references[{index}]", row) for index, text in enumerate(references))
    if any(not text.strip() for text in texts):
        raise DataError(f"{row.where}: references[{[bool(t.strip()) for t in texts].index(False)}] is empty")
    if "references" in values and not texts and not set(COMPLETIONS) & set(values):
        raise DataError(f"{row.where}: references is empty and there is no completion: nothing to train on")
    return texts


def _text(values: Mapping[str, Any], name: str, row: Row) -> str:
    return turns.string(values.get(name), name, row)


def _non_empty(values: Mapping[str, Any], name: str, row: Row) -> str:
    text = _text(values, name, row) if values.get(name) is not None else ""
    if not text.strip():
        raise DataError(
            f"{row.where}: {name} is empty, so there is nothing to train on\n  remove the row, or give it an answer"
        )
    return text


def _optional(values: Mapping[str, Any], name: str, row: Row) -> str:
    return _text(values, name, row) if values.get(name) is not None else ""
