"""Evaluate the models of a server on the same rows, side by side, by the texts that they answer.

    settings = GenerationSettings(max_tokens=128, temperature=0)
    report = evaluate_served(client, questions_of(examples), ["base", "sql"], settings)

Servers do not report the loss. The prompt of a row is what stands before its first answer; the server formats it with
the template of the model that is asked. Prompts, references and scores are those of `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..data.shapes import Example
from ..errors import ConfigError, DataError
from ..serve.client import Client, GenerationSettings, Served
from ..tasks.metrics.texts import Compared, score
from ..tasks.task import Asked
from .evaluate import Judged, Report, spread


@dataclass(frozen=True)
class Question:
    """What a server is asked: a conversation, or a text to continue. `asked`: it as text, with its right answers."""

    prompt: str | list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...]
    asked: Asked


def questions_of(examples: Sequence[Example], continued: bool = False) -> list[Question]:
    """Return the distinct prompts in order of appearance, each with the distinct answers in its rows.

    continued: prompts are texts to continue, not conversations. Raises DataError for a row without a prompt, and for a
    conversation that is to be continued.
    """
    found: dict[str, list[Example]] = {}
    for example in examples:
        where = example.row.where
        if len(_before(example)) == 0:
            raise DataError(
                f"{where}: the row has no prompt to ask a server for; all of a plain text is trained\n"
                "  give rows with prompt and completion, or evaluate the loss here: lorakit eval without --server"
            )
        if continued and example.kind == "chat":
            raise DataError(
                f"{where}: a conversation, which --template none cannot continue as a text\n  omit --template"
            )
        found.setdefault(json.dumps([_before(example), example.tools], ensure_ascii=False), []).append(example)
    questions = []
    for rows in found.values():
        turns = _before(rows[0])
        answers = dict.fromkeys(answer.strip() for row in rows for answer in _answers(row))
        asked = Asked([], "\n".join(_text(turn) for turn in turns), tuple(answers), rows[0].row.where)
        questions.append(Question(asked.text if continued else turns, rows[0].tools, asked))
    return questions


def evaluate_served(
    client: Client,
    questions: Sequence[Question],
    models: Sequence[str],
    how: GenerationSettings,
    *,
    samples: int = 3,
    at_once: int = 32,
    compared: Compared | None = None,
    on_rows: Callable[[str, int], None] | None = None,
) -> Report:
    """Ask each model for all answers, `at_once` at a time, and score them. Raises ServerError, and DataError."""
    judged = []
    for name in models:

        def ask(question: Question, model: str = name) -> tuple[str, bool]:
            answer = client.answer(model, question.prompt, how, question.tools)
            if on_rows is not None:
                on_rows(model, 1)
            return answer.text.strip(), answer.cut

        with ThreadPoolExecutor(at_once) as pool:
            jobs = [pool.submit(ask, question) for question in questions]
            try:
                answers = [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        texts = [text for text, _ in answers]
        scores = score(texts, [question.asked.references for question in questions], compared)
        judged.append(Judged(name, None, scores, tuple(texts), sum(cut for _, cut in answers)))
    return Report(tuple(judged), tuple(q.asked for q in questions), tuple(spread(range(len(questions)), samples)))


def chosen_models(served: Sequence[Served], base: str | None, adapters: Sequence[str]) -> list[str]:
    """Return the names to ask: the base, by default the first that the server lists, and then the adapters.

    Names that the server does not list are asked too: it may load adapters on first use. Raises ConfigError if it
    lists nothing.
    """
    if base is None and not served:
        raise ConfigError("the server lists no model\n  name one: --model NAME")
    first = base or next((model.name for model in served if model.parent is None), served[0].name)
    return list(dict.fromkeys([first, *adapters]))


def check_unlisted(client: Client, served: Sequence[Served], names: Sequence[str], question: Question) -> None:
    """Ask the models that the server does not list for one token each.

    So a mistyped name is an error before the others have answered all rows. Raises ServerError.
    """
    listed = {model.name for model in served}
    for name in names:
        if name not in listed:
            client.answer(name, question.prompt, GenerationSettings(max_tokens=1, temperature=0.0), question.tools)


def _before(example: Example) -> list[dict[str, Any]]:
    """Return the turns before the first answer, in OpenAI's form."""
    messages = example.messages
    first = next(index for index, message in enumerate(messages) if message.trained)
    return [_sent(message.turn | {"role": message.role}) for message in messages[:first]]


def _sent(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn as OpenAI's API takes it: there the arguments of a call are JSON text."""
    turn = dict(turn)
    calls = turn.get("tool_calls")
    if calls:
        turn["tool_calls"] = [
            {"id": f"call_{n}"} | dict(call) | {"function": _function(call["function"])} for n, call in enumerate(calls)
        ]
    return turn


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return dict(function) | {"arguments": text}


def _answers(example: Example) -> list[str]:
    first = next(message for message in example.messages if message.trained)
    return [*([first.content] if first.content.strip() else []), *example.references]


def _text(turn: Mapping[str, Any]) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
