"""`tools` and `tool_choice`: which tools a prompt shows, and the schema of an answer that must be a call."""

from __future__ import annotations

import json

import pytest

from lorakit.errors import DataError
from lorakit.serve.tool_calls.choice import tool_request
from lorakit.serve.tool_calls.forced import FORCED
from lorakit.serve.tool_calls.stream import read_calls


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}, "like": {"$ref": "#"}},
    "required": ["root"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"label": {"type": "string"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["label"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [tool("weather", PLACE), tool("now"), tool("tree", TREE)]
NAMED = {"type": "function", "function": {"name": "weather"}}


def names(found):
    return [each["function"]["name"] for each in found.tools]


def test_auto_shows_the_tools_and_demands_nothing():
    for choice in (None, "auto"):
        found = tool_request(TOOLS, choice)
        assert names(found) == ["weather", "now", "tree"]
        assert found.schema is None
    assert "parameters" not in found.tools[1]["function"]  # null: a function without parameters


def test_none_shows_no_tools():
    assert tool_request(TOOLS, "none").tools == ()
    for nothing in (None, [], ()):
        assert not tool_request(nothing).tools


def test_required_and_named_hold_the_answer_to_a_schema():
    assert names(tool_request(TOOLS, "required")) == names(tool_request(TOOLS, NAMED)) == ["weather", "now", "tree"]
    required, named = (json.loads(tool_request(TOOLS, choice).schema) for choice in ("required", NAMED))
    called = [item["properties"]["name"]["const"] for item in required["items"]["anyOf"]]
    assert called == ["weather", "now", "tree"]
    assert "maxItems" not in required
    assert [item["properties"]["name"]["const"] for item in named["items"]["anyOf"]] == ["weather"]
    assert named["maxItems"] == 1
    assert json.loads(tool_request(TOOLS, "required", parallel=False).schema)["maxItems"] == 1


def test_allowed_tools_are_shown_alone():
    allowed = {"mode": "auto", "tools": [NAMED]}
    assert names(tool_request(TOOLS, {"type": "allowed_tools", "allowed_tools": allowed})) == ["weather"]
    demanded = tool_request(TOOLS, {"type": "allowed_tools", "allowed_tools": {**allowed, "mode": "required"}})
    assert json.loads(demanded.schema)["items"]["anyOf"][0]["properties"]["name"] == {"const": "weather"}


ANSWERS = [
    ([{"name": "weather", "arguments": {"city": "Rome"}}], True),
    ([{"name": "now", "arguments": {}}, {"name": "weather", "arguments": {"city": "é"}}], True),
    ([{"name": "tree", "arguments": {"root": {"label": "a", "next": {"label": "b"}}}}], True),
    ([{"name": "tree", "arguments": {"root": {"label": "a"}, "like": {"root": {"label": "b"}}}}], True),
    ([], False),
    ([{"name": "weather", "arguments": {}}], False),
    ([{"name": "other", "arguments": {}}], False),
    ([{"name": "tree", "arguments": {"root": {"label": 3}}}], False),
    ([{"name": "tree", "arguments": {"root": {"label": "a"}, "like": {"root": {}}}}], False),
    ([{"name": "now"}], False),
]


def test_the_schema_admits_calls_and_nothing_else():
    """jsonschema decides; references within a tool's parameters must still be found."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(tool_request(TOOLS, "required").schema))
    for answer, is_valid in ANSWERS:
        assert validator.is_valid(answer) == is_valid, answer


def test_the_grammar_engine_admits_the_same():
    """llguidance, which the embedded engine uses, compiles the schema and walks each answer byte by byte."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        tool_request(TOOLS, "required").schema, overrides={"whitespace_flexible": False}
    )
    for answer, is_valid in ANSWERS:
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        assert not matcher.get_error()
        text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        ids = tokenizer.tokenize_str(text)
        admitted = matcher.validate_tokens(ids) == len(ids)
        assert (admitted and matcher.consume_tokens(ids) and matcher.is_accepting()) == is_valid, text


def test_a_forced_answer_is_read_as_calls():
    for answer, is_valid in ANSWERS[:4]:
        assert is_valid
        found = read_calls(json.dumps(answer), FORCED, TOOLS)
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [
            (each["name"], each["arguments"]) for each in answer
        ]
        assert found.content == ""


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ("weather", None, "tools is a str; expected a list"),
        ([3], None, r"tools\[0\] is a int"),
        ([{"type": "web_search"}], None, r"tools\[0\].type is 'web_search'"),
        ([{"type": "function"}], None, r"tools\[0\].function is missing"),
        ([tool("a b")], None, r"tools\[0\].function.name is 'a b'"),
        ([tool("a", [])], None, r"tools\[0\].function.parameters is a list"),
        ([tool("a", {"type": "string"})], None, r"parameters.type is 'string'; a function's is object"),
        ([tool("a"), tool("a")], None, "two functions named 'a'"),
        (TOOLS, "requird", "tool_choice is 'requird'; expected none, auto, required .* did you mean 'required'"),
        ([], "required", "tool_choice is 'required', but the request has no tools"),
        (TOOLS, {"type": "tool"}, "tool_choice.type is 'tool'"),
        (TOOLS, {"type": "function", "function": {"name": "wether"}}, "did you mean 'weather'"),
        (TOOLS, {"type": "function"}, "names the function None, which is none of tools"),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {}}, "expected to have mode"),
    ],
)
def test_what_is_wrong_is_named(tools, choice, says):
    with pytest.raises(DataError, match=says):
        tool_request(tools, choice)
