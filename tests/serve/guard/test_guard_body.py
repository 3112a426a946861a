"""A body is bounded in bytes, time and nesting, whatever its headers say."""

from __future__ import annotations

import json
import time

import pytest
from asgi_calls import call, echo
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.serve.guard.body import DISCARDED, bounded_body, depth_exceeds


def post(parts, headers=(), most=100, nesting=4, **more):
    return call(bounded_body(echo, most, nesting, 0.2), "/v1/completions", "POST", headers, parts, **more)


def test_a_body_within_the_bounds_arrives_as_it_was_sent():
    assert post([b"a" * 60, b"", b"b" * 40]).body == b"a" * 60 + b"b" * 40
    assert post([b""]).status == 200


@pytest.mark.parametrize("headers", [{}, {"content-length": "5"}, {"transfer-encoding": "chunked"}])
def test_bytes_are_counted_as_they_arrive(headers):
    answer = post([b"x" * 50, b"x" * 51], headers)
    assert (answer.status, answer.code, answer.headers["connection"]) == (413, "body_too_large", "close")


def test_a_body_that_never_ends_is_not_read_to_its_end():
    parts = [b"x" * 100] * 1000
    answer = post(parts)
    assert answer.status == 413
    assert answer.reads == DISCARDED + 1
    assert post(parts, {"content-length": "100000"}).reads == 0


def test_a_body_that_does_not_come_is_not_waited_for():
    async def slow(scope, receive, send):
        raise AssertionError("the application must not see it")

    began = time.monotonic()
    answer = call(bounded_body(slow, 100, 4, 0.05), method="POST", parts=[])
    assert (answer.status, answer.code) == (408, "body_timeout")
    assert answer.headers["x-should-retry"] == "false"
    assert time.monotonic() - began < 5


def test_a_client_that_leaves_is_not_answered():
    answer = post([b"a", b"b"], hang_up_after=1)
    assert (answer.status, answer.error) == (None, None)


def test_compressed_bodies_are_refused():
    assert post([b"x"], {"content-encoding": "gzip"}).status == 415
    assert post([b"x"], {"content-encoding": "identity"}).status == 200


def test_the_application_hears_of_a_hang_up_after_the_body():
    async def listening(scope, receive, send):
        assert (await receive())["body"] == b"abc"
        assert (await receive())["type"] == "http.disconnect"

    assert call(bounded_body(listening, 100, 4), method="POST", parts=[b"abc"], hang_up_after=1).error is None


def test_nesting_is_bounded_outside_of_texts():
    assert post([b"[[[[]]]]"]).status == 200
    answer = post([b'{"a":[[[', b"[1]]]]}"])
    assert (answer.status, answer.code) == (400, "nested_too_deep")
    assert post([json.dumps({"a": "[[[[[[[[", 'b"]': "}}{{{{{"}).encode()]).status == 200


def depth_of(value) -> int:
    """By walking the value: an oracle that knows nothing of text."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


TEXT = st.text(st.sampled_from('[]{}"\\,:aé'), max_size=8)
VALUES = st.recursive(TEXT | st.integers(), lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3))


@settings(max_examples=150, deadline=None)
@given(VALUES, st.integers(0, 6), st.booleans())
def test_depth_is_that_of_the_parsed_value(value, most, ascii):
    assert depth_exceeds(json.dumps(value, ensure_ascii=ascii).encode(), most) == (depth_of(value) > most)


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 500_000, b'"' * 1_000_000, b"\\" * 1_000_000, b"[]," * 300_000])
def test_a_million_bytes_made_to_be_slow_are_not(body):
    began = time.process_time()
    depth_exceeds(body, 32)
    assert time.process_time() - began < 2  # quadratic time would be hours


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_json_in_other_encodings_is_refused_as_its_brackets_cannot_be_counted(encoding):
    """U+0122 has the byte of a quote, behind which a count of bytes would take the brackets for text."""
    body = ('{"model":"\u0122\u0122\u0122","x":' + "[" * 600 + "]" * 600 + "}").encode(encoding)
    answer = post([body], most=10_000)
    assert (answer.status, answer.code) == (400, "not_utf8")
    assert post([json.dumps({"a": "\0 \ufeff"}).encode()], most=10_000).status == 200  # NUL as JSON writes it
