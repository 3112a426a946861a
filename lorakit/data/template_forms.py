"""Find out, once per chat template, in which form it takes what conversations hold.

    content      a text, or a list of parts        some templates write only one of the two
    arguments    an object, or JSON text           of a tool call; the wrong one is rejected or quoted twice
    tools        with or without the "function" level
    no content   the key left out, or ""           of a turn that only calls tools
    ids          of calls and results              Mistral's templates reject calls without

A form is tried on a small conversation, and taken if the template writes its text. So no list of model families has to
be right, and data in either form trains on what the template writes for the form it knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakit.data.turns import Message
from lorakit.errors import DataError

REASONING = ("reasoning_content", "thinking", "reasoning")  # what data calls a turn's reasoning
Write = Callable[[Sequence[dict[str, Any]], bool, Sequence[dict[str, Any]]], str]  # turns, generation prompt?, tools

QUESTION, ANSWER, RESULT = "How is the weather?", "It rains today.", "Warm and dry."
ARGUMENTS = {"city": "Rome"}
CALL_ID = "call12345"  # nine letters and digits, as Mistral's templates demand
NAME = "find_weather"
FUNCTION = {
    "name": NAME,
    "description": "Finds out how it is outside.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "a place"}},
        "required": ["city"],
    },
}
TOOL = {"type": "function", "function": FUNCTION}


class TemplateForms:
    """The forms one template takes. `write` renders turns with it, and may raise anything."""

    def __init__(self, write: Write, source: str):
        self._write, self.source = write, source

    # ---------------------------------------------------------------------------- for data

    def turn(self, message: Message, where: str) -> dict[str, Any]:
        """Return a turn in the forms that the template takes. Raises DataError, naming `where`."""
        turn = message.turn
        if turn["role"] == "developer" and "developer" not in self.source:
            turn["role"] = "system"
        content = turn.get("content")
        if isinstance(content, str):
            if not self._takes_text and self._takes_parts:
                turn["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list):
            if not self._takes_parts and not any(isinstance(p, dict) and "text" not in p for p in content):
                turn["content"] = message.content
        elif turn.get("tool_calls") and not self._takes_no_content:
            turn["content"] = self._as_content("")
        reasoning = next((turn[key] for key in REASONING if key in turn), None)
        if reasoning is not None:  # as transformers does since 5.24: templates read the first or the second name
            turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
        if turn.get("tool_calls"):
            turn["tool_calls"] = [
                self._call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(turn["tool_calls"])
            ]
        return turn

    def with_ids(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return turns whose calls and results have ids, if the template rejects calls without."""
        if not any(turn.get("tool_calls") for turn in turns) or not self._needs_ids:
            return turns
        found, waiting, number = [], list[str](), 0
        for turn in turns:
            calls = []
            for call in turn.get("tool_calls", ()):
                number += 1
                calls.append(call if "id" in call else {"id": f"call{number:05d}", **call})
            waiting += [call["id"] for call in calls]
            if turn["role"] == "tool" and waiting:
                turn = {"tool_call_id": waiting.pop(0), **turn}
            found.append({**turn, "tool_calls": calls} if calls else turn)
        return found

    def tools(self, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return tool descriptions, with their "function" level where the template needs it."""
        if all("function" in tool for tool in tools) or self._takes_bare_tools:
            return list(tools)
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]

    def _call(self, call: Mapping[str, Any], where: str) -> dict[str, Any]:
        function = dict(call["function"])
        function["arguments"] = self._arguments(function["arguments"], f"{where}.function.arguments")
        return {**call, "function": function}

    def _arguments(self, given: object, where: str) -> object:
        as_objects = self._takes_objects or not self._takes_json_text
        if not isinstance(given, str):
            return given if as_objects else json.dumps(given, ensure_ascii=False)
        try:
            found = json.loads(given) if given.strip() else {}
        except json.JSONDecodeError as error:
            if self._takes_json_text:
                return given
            raise DataError(f"{where}, column {error.colno}: broken JSON: {error.msg}") from error
        return found if as_objects and isinstance(found, dict) else given

    # ---------------------------------------------------------------------------- the end of an answer

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after the text of an answer that ends the conversation."""
        text = self._try([self._user, self._answer]) or ""
        return text.rpartition(ANSWER)[2] if ANSWER in text else ""

    @cached_property
    def next_turn(self) -> str:
        """What it writes after an answer, up to the text of the user's next turn."""
        return self._between([self._user, self._answer], {"role": "user", "content": self._as_content(RESULT)})

    @cached_property
    def next_result(self) -> str:
        """What it writes after a tool call, up to the tool's result."""
        result = {"role": "tool", "tool_call_id": CALL_ID, "name": NAME, "content": RESULT}
        return self._between([self._user, self._calling(ARGUMENTS)], result)

    def _between(self, turns: list[dict[str, Any]], following: dict[str, Any]) -> str:
        before, text = self._try(turns, [TOOL]), self._try([*turns, following], [TOOL])
        if not before or not text or not text.startswith(before) or RESULT not in text:
            return ""
        return text[len(before) :].partition(RESULT)[0]

    # ---------------------------------------------------------------------------- trials

    @cached_property
    def _takes_text(self) -> bool:
        text = self._try([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])
        return text is not None and QUESTION in text and ANSWER in text

    @cached_property
    def _takes_parts(self) -> bool:
        question, answer = ([{"type": "text", "text": text}] for text in (QUESTION, ANSWER))
        text = self._try([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        if text is None or QUESTION not in text or ANSWER not in text:
            return False
        return str(question) not in text and json.dumps(question) not in text

    @cached_property
    def _takes_objects(self) -> bool:
        text = self._try([self._user, self._calling(ARGUMENTS)], [TOOL])
        return text is not None and ARGUMENTS["city"] in text

    @cached_property
    def _takes_json_text(self) -> bool:
        given = json.dumps(ARGUMENTS)
        text = self._try([self._user, self._calling(given)], [TOOL])
        return text is not None and given in text

    @cached_property
    def _needs_ids(self) -> bool:
        turn = self._calling(ARGUMENTS if self._takes_objects else json.dumps(ARGUMENTS))
        without = {**turn, "tool_calls": [{k: v for k, v in turn["tool_calls"][0].items() if k != "id"}]}
        return self._try([self._user, without], [TOOL]) is None and self._try([self._user, turn], [TOOL]) is not None

    @cached_property
    def _takes_no_content(self) -> bool:
        turn = self._calling(ARGUMENTS if self._takes_objects else json.dumps(ARGUMENTS))
        del turn["content"]
        text = self._try([self._user, turn], [TOOL])
        return text is not None and "None" not in text

    @cached_property
    def _takes_bare_tools(self) -> bool:
        text = self._try([self._user], [FUNCTION])
        return text is not None and NAME in text

    @property
    def _user(self) -> dict[str, Any]:
        return {"role": "user", "content": self._as_content(QUESTION)}

    @property
    def _answer(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self._as_content(ANSWER)}

    def _as_content(self, text: str) -> object:
        return [{"type": "text", "text": text}] if not self._takes_text and self._takes_parts else text

    @staticmethod
    def _calling(arguments: object) -> dict[str, Any]:
        call = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": arguments}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    def _try(self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str | None:
        """What the template writes, None if it rejects the turns."""
        try:
            return self._write(turns, False, tools)
        # A chat template is a program and may raise anything to reject a conversation.
        except Exception:
            return None
