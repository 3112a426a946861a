"""`response_format` of a request: the JSON schema that the answer is held to, checked before an engine compiles it.

    {"type": "text"}                                                        no schema
    {"type": "json_object"}                                                 any JSON object
    {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}  this schema, `strict` or not

`strict: true` asks for what the engine does anyway: every answer with a schema satisfies it. OpenAI's further rules for
strict schemas (all properties required, no others allowed) are not imposed. What is checked here is that the schema is
well-formed and refers to nothing outside itself; what of JSON Schema an engine cannot do, it says itself (`Cannot`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, did_you_mean

FORMATS = ("text", "json_object", "json_schema")
OBJECT = '{"type": "object"}'
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
NESTING = 64  # levels of a schema
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Keywords whose value is one schema, a list of schemas, or schemas by name.
ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "additionalItems")
SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def schema_of(response_format: object, most: int = 65_536) -> str | None:
    """Return the schema of a response_format as JSON text, None for plain text. most: characters.

    Raises DataError, naming the key within the schema.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise DataError(f"response_format is a {type(response_format).__name__}; expected an object with type")
    kind = response_format.get("type")
    if kind not in FORMATS:
        hint = did_you_mean(kind, FORMATS) if isinstance(kind, str) else ""
        raise DataError(f"response_format.type is {kind!r}; expected {', '.join(FORMATS)}{hint}")
    if kind != "json_schema":
        return OBJECT if kind == "json_object" else None
    given = response_format.get("json_schema")
    if not isinstance(given, Mapping):
        raise DataError("response_format.json_schema is missing; expected an object with name and schema")
    name, strict = given.get("name"), given.get("strict")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DataError(
            f"response_format.json_schema.name is {name!r}; expected up to 64 of the characters a-z A-Z 0-9 _ - ."
        )
    if strict is not None and not isinstance(strict, bool):
        raise DataError(f"response_format.json_schema.strict is {strict!r}; expected true or false")
    if "schema" not in given:
        return OBJECT  # OpenAI's default
    return checked_schema(given["schema"], "response_format.json_schema.schema", most)


def checked_schema(schema: object, key: str, most: int = 65_536) -> str:
    """Return a JSON schema as text. Raises DataError for what is malformed, too long or refers to another document."""
    if not isinstance(schema, Mapping):
        raise DataError(f"{key} is a {type(schema).__name__}; expected an object")
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise DataError(f"{key} is nested too deep; at most {NESTING} levels") from None
    if len(text) > most:  # before the walk, which takes a second for a megabyte
        raise DataError(f"{key} has {len(text):,} characters; at most {most:,}")
    _check(schema, key, 0)
    return text


def _check(schema: object, key: str, level: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise DataError(f"{key} is {_shown(schema)}; expected a schema: an object, or true or false")
    if level > NESTING:
        raise DataError(f"{key} is nested too deep; at most {NESTING} levels")
    _check_type(schema.get("type"), f"{key}.type")
    _check_reference(schema.get("$ref"), f"{key}.$ref")
    _check_lists(schema, key)
    for name in ONE:
        if name in schema and not (name == "items" and isinstance(schema[name], list)):
            _check(schema[name], f"{key}.{name}", level + 1)
    for name in (*SEVERAL, "items"):
        if name in schema and (name != "items" or isinstance(schema[name], list)):
            for index, each in enumerate(_list(schema[name], f"{key}.{name}")):
                _check(each, f"{key}.{name}[{index}]", level + 1)
    for name in NAMED:
        if name in schema:
            if not isinstance(schema[name], Mapping):
                raise DataError(f"{key}.{name} is {_shown(schema[name])}; expected an object of schemas")
            for each, value in schema[name].items():
                _check(value, f"{key}.{name}.{each}", level + 1)


def _check_type(kind: object, key: str) -> None:
    kinds: Sequence[object] = kind if isinstance(kind, list) else [] if kind is None else [kind]
    for each in kinds:
        if each not in TYPES:
            hint = did_you_mean(each, TYPES) if isinstance(each, str) else ""
            raise DataError(f"{key} is {_shown(each)}; expected one of {', '.join(TYPES)}{hint}")


def _check_reference(reference: object, key: str) -> None:
    if reference is None:
        return
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise DataError(
            f"{key} is {_shown(reference)}; expected a place within the schema, such as '#/$defs/NAME'\n"
            "  nothing is fetched: put the other document's schema under $defs"
        )


def _check_lists(schema: Mapping[str, Any], key: str) -> None:
    required = schema.get("required")
    if required is not None and not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise DataError(f"{key}.required is {_shown(required)}; expected a list of names")
    if "enum" in schema and not _list(schema["enum"], f"{key}.enum"):
        raise DataError(f"{key}.enum is empty, so nothing satisfies it")


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{key} is {_shown(value)}; expected a list")
    return value


def _shown(value: object) -> str:
    short = isinstance(value, str | int | float | None) and len(repr(value)) < 60
    return repr(value) if short else f"a {type(value).__name__}"
