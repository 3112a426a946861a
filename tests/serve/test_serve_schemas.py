"""`response_format` to a JSON schema: OpenAI's forms, and what is wrong where."""

from __future__ import annotations

import json

import pytest

from lorakit.errors import DataError
from lorakit.serve.schemas import schema_of

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"]}, "boss": {"$ref": "#"}},
    "required": ["name"],
    "additionalProperties": False,
}


def formatted(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


def test_forms_of_openai():
    assert schema_of(None) is None
    assert schema_of({"type": "text"}) is None
    assert schema_of({"type": "json_object"}) == '{"type": "object"}'
    assert json.loads(schema_of(formatted(PERSON))) == PERSON
    assert json.loads(schema_of(formatted(PERSON, strict=True, description="who"))) == PERSON
    assert schema_of({"type": "json_schema", "json_schema": {"name": "any"}}) == '{"type": "object"}'


def test_a_schema_keeps_its_order_and_letters():
    """The grammar writes properties in this order."""
    schema = {"type": "object", "properties": {"z": {"const": "é"}, "a": True}}
    assert schema_of(formatted(schema)) == '{"type": "object", "properties": {"z": {"const": "é"}, "a": true}}'


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("json", "response_format is a str"),
        ({"type": "jsonobject"}, "did you mean 'json_object'"),
        ({"type": 3}, "response_format.type is 3; expected text"),
        ({"type": "json_schema"}, "response_format.json_schema is missing"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "json_schema.name is None"),
        (formatted({}, strict="yes"), "json_schema.strict is 'yes'; expected true or false"),
        (formatted(True), "schema is a bool; expected an object"),
        (formatted({"type": "strnig"}), r"schema.type is 'strnig'; .* did you mean 'string'"),
        (formatted({"properties": {"a": {"type": "text"}}}), r"schema.properties.a.type is 'text'"),
        (formatted({"properties": ["a"]}), "schema.properties is a list; expected an object of schemas"),
        (formatted({"anyOf": [{"type": "string"}, 3]}), r"schema.anyOf\[1\] is 3; expected a schema"),
        (formatted({"anyOf": {}}), "schema.anyOf is a dict; expected a list"),
        (formatted({"items": {"type": ["array", "nul"]}}), r"schema.items.type is 'nul'; .* did you mean 'null'"),
        (formatted({"items": [{"type": "x"}]}), r"schema.items\[0\].type is 'x'"),
        (formatted({"required": "name"}), "schema.required is 'name'; expected a list of names"),
        (formatted({"enum": []}), "schema.enum is empty"),
        (formatted({"$ref": "https://example.com/a.json"}), r"schema.\$ref is 'https://example.com/a.json'.*"),
        (formatted({"$defs": {"a": {"$ref": "b.json"}}}), r"schema.\$defs.a.\$ref is 'b.json'"),
    ],
)
def test_what_is_wrong_is_named(given, says):
    with pytest.raises(DataError, match=says):
        schema_of(given)


def test_size_and_nesting_are_bounded():
    with pytest.raises(DataError, match="characters; at most 1,000"):
        schema_of(formatted({"enum": ["x" * 990]}), 1_000)
    deep: dict = {"type": "string"}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(DataError, match="nested too deep; at most 64 levels"):
        schema_of(formatted(deep))
