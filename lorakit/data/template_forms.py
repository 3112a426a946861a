"""Find out, once per chat template, in which form it takes what conversations hold.

    content      a text, or a list of parts        some templates write only one of the two
    arguments    an object, or JSON text           of a tool call; the wrong one is rejected or quoted twice
    tools        with or without the "function" level
    no content   the key left out, or ""           of a turn that only calls tools
    results      an object, or JSON text           of a tool, where the data has an object
    ids          of calls and results              Mistral's templates reject calls without, and ids of other lengths
    reasoning    a key, or a part of the content   the key is what most templates read

A form is tried on a small conversation, and taken if the template writes its text. So no list of model families has to
be right, and data in either form trains on what the template writes for the form it knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.data.found_once import found_once
from lorakit.data.turns import Message, is_text, other_parts
from lorakit.errors import DataError

REASONING = ("reasoning_content", "thinking", "reasoning")  # what data calls a turn's reasoning
THOUGHTS = ("thinking", "reasoning")  # the types of its parts
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
        self._seen: dict[tuple[object, ...], bool] = {}  # what trials have found of parts and ids

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
            turn |= self._of_parts(message, content, where)
        elif isinstance(content, dict) and not self._takes_result_objects:
            turn["content"] = self._as_content(message.content)
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

    def _of_parts(self, message: Message, parts: Sequence[Any], where: str) -> dict[str, Any]:
        """Return what a turn gets whose content is a list of parts. Raises DataError for a part that needs a list."""
        lifted = [part for part in other_parts(parts) if _thought(part) and not self._shows_thought(part)]
        kept = [part for part in parts if part not in lifted]
        found: dict[str, Any] = {"reasoning_content": "".join(map(_thought, lifted))} if lifted else {}
        if self._takes_parts:
            typed = [{**p, "type": "text"} if isinstance(p, dict) and is_text(p) else p for p in kept]
            return found | {"content": typed}
        if others := other_parts(kept):
            raise DataError(
                f"{where}: the chat template takes text only, but a turn of role {message.role} has a part of type "
                f"{others[0].get('type')}\n  give a template that writes it (--chat-template FILE), or take it out of "
                "the data"
            )
        return found | {"content": message.content}

    def rejects_ids(self, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template rejects an id that one of some calls has."""
        return any("id" in call and not self._takes_id(call["id"]) for call in calls)

    def with_ids(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return turns whose calls and results have ids, if the template rejects calls without, or with theirs."""
        all_calls = [call for turn in turns for call in turn.get("tool_calls", ())]
        if not all_calls or not (self._needs_ids or self.rejects_ids(all_calls)):
            return turns
        found, waiting, renamed, number = [], list[str](), dict[str, str](), 0
        for turn in turns:
            calls = []
            for call in turn.get("tool_calls", ()):
                number += 1
                own = call.get("id")
                if own is None or not self._takes_id(own):
                    call = {**call, "id": f"call{number:05d}"}
                    renamed[str(own)] = call["id"]
                calls.append(call)
            waiting += [call["id"] for call in calls]
            if turn["role"] == "tool" and waiting:
                own = turn.get("tool_call_id")
                answered = waiting[0] if own is None else renamed.get(str(own), own)
                waiting = [other for other in waiting if other != answered]
                turn = {**turn, "tool_call_id": answered}
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

    @found_once
    def after_answer(self) -> str:
        """What the template writes after the text of an answer that ends the conversation."""
        text = self._try([self._user, self._answer]) or ""
        return text.rpartition(ANSWER)[2] if ANSWER in text else ""

    @found_once
    def next_turn(self) -> str:
        """What it writes after an answer, up to the text of the user's next turn."""
        return self._between([self._user, self._answer], {"role": "user", "content": self._as_content(RESULT)})

    @found_once
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

    @found_once
    def _takes_text(self) -> bool:
        text = self._try([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])
        return text is not None and QUESTION in text and ANSWER in text

    @found_once
    def _takes_parts(self) -> bool:
        question, answer = ([{"type": "text", "text": text}] for text in (QUESTION, ANSWER))
        text = self._try([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        if text is None or QUESTION not in text or ANSWER not in text:
            return False
        return str(question) not in text and json.dumps(question) not in text

    @found_once
    def _takes_objects(self) -> bool:
        text = self._try([self._user, self._calling(ARGUMENTS)], [TOOL])
        return text is not None and ARGUMENTS["city"] in text

    @found_once
    def _takes_json_text(self) -> bool:
        given = json.dumps(ARGUMENTS)
        text = self._try([self._user, self._calling(given)], [TOOL])
        return text is not None and given in text

    def _shows_thought(self, part: Mapping[str, Any]) -> bool:
        """Whether the template writes a part of reasoning, given as this one is."""
        key = ("thought", part.get("type"), *part)
        if key not in self._seen:
            like = {**part, **{name: RESULT for name in (*THOUGHTS, "text") if part.get(name)}}
            content = [like, {"type": "text", "text": ANSWER}]
            text = self._try([self._user, {"role": "assistant", "content": content}])
            self._seen[key] = text is not None and RESULT in text and str(like) not in text
        return self._seen[key]

    def _takes_id(self, given: object) -> bool:
        """Whether the template takes a call's id. Those that reject one ask for a length, and letters and digits."""
        key = ("id", len(str(given)), str(given).isalnum())
        if key not in self._seen:
            turn = self._calling(ARGUMENTS if self._takes_objects else json.dumps(ARGUMENTS))
            other = {**turn, "tool_calls": [{**turn["tool_calls"][0], "id": given}]}
            takes_ours = self._try([self._user, turn], [TOOL]) is not None
            self._seen[key] = not takes_ours or self._try([self._user, other], [TOOL]) is not None
        return self._seen[key]

    @found_once
    def _needs_ids(self) -> bool:
        turn = self._calling(ARGUMENTS if self._takes_objects else json.dumps(ARGUMENTS))
        without = {**turn, "tool_calls": [{k: v for k, v in turn["tool_calls"][0].items() if k != "id"}]}
        return self._try([self._user, without], [TOOL]) is None and self._try([self._user, turn], [TOOL]) is not None

    @found_once
    def _takes_result_objects(self) -> bool:
        turn = self._calling(ARGUMENTS if self._takes_objects else json.dumps(ARGUMENTS))
        text = self._try(
            [self._user, turn, {"role": "tool", "tool_call_id": CALL_ID, "content": {"sky": RESULT}}], [TOOL]
        )
        return text is not None and RESULT in text and str({"sky": RESULT}) not in text

    @found_once
    def _takes_no_content(self) -> bool:
        turn = self._calling(ARGUMENTS if self._takes_objects else json.dumps(ARGUMENTS))
        del turn["content"]
        text = self._try([self._user, turn], [TOOL])
        return text is not None and "None" not in text

    @found_once
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


def _thought(part: Mapping[str, Any]) -> str:
    """Return the text of a part of reasoning, which may be a list of parts itself; "" for another part."""
    if part.get("type") not in THOUGHTS:
        return ""
    text = next((part[name] for name in (*THOUGHTS, "text") if part.get(name)), "")
    if isinstance(text, list):
        return "".join(str(each.get("text", "")) if isinstance(each, dict) else str(each) for each in text)
    return str(text)
