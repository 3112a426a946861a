"""Two keys: the one for using does not manage, and nothing of a body is read before a key is known."""

from __future__ import annotations

import os

import pytest
from asgi_calls import call, echo

from lorakit.errors import ConfigError, LorakitWarning
from lorakit.serve.guard.keys import Keys, only_with_key, read_keys

USE, OTHER, MANAGE = "use-0123456789abcdef", "other-0123456789abcdef", "manage-0123456789abcdef"
BOTH = Keys((USE, OTHER), (MANAGE,))
LOAD = "/v1/load_lora_adapter"


def status(keys, path, key=None, method="POST", scheme="Bearer"):
    headers = {} if key is None else {"authorization": f"{scheme} {key}"}
    return call(only_with_key(echo, keys), path, method, headers).status


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/docs", "/", "/unknown", "/v1/Load_Lora_Adapter"]
)
def test_the_models_are_used_with_a_key(path):
    assert [status(BOTH, path, key) for key in (USE, OTHER, MANAGE)] == [200, 200, 200]
    for key in (None, "", USE[:-1], USE + "x", USE.upper(), "é" * 20, MANAGE + " "):
        assert status(BOTH, path, key) == (200 if key == MANAGE + " " else 401), key
    assert status(BOTH, path, USE, scheme="Basic") == 401
    assert status(BOTH, path, USE, scheme="bearer") == 200


@pytest.mark.parametrize("path", [LOAD, "/v1/unload_lora_adapter", "/metrics"])
def test_the_server_is_managed_with_the_other(path):
    assert [status(BOTH, path, key) for key in (None, USE, OTHER, MANAGE)] == [401, 403, 403, 200]


def test_without_a_manage_key_nobody_manages_and_the_answer_says_how_to_change_that():
    answer = call(only_with_key(echo, Keys((USE,))), LOAD, "POST", {"authorization": f"Bearer {USE}"})
    assert (answer.status, answer.code) == (403, "no_manage_key")
    assert "--manage-key-file" in answer.message


def test_a_manage_key_alone_leaves_the_models_open():
    keys = Keys((), (MANAGE,))
    assert (status(keys, "/v1/models"), status(keys, LOAD), status(keys, LOAD, MANAGE)) == (200, 401, 200)


def test_without_keys_everything_is_open_and_a_dummy_key_does_no_harm():
    assert (status(Keys(), LOAD), status(Keys(), "/v1/models", "EMPTY")) == (200, 200)


def test_health_needs_no_key():
    assert status(BOTH, "/health", method="GET") == 200


def test_a_body_is_not_read_before_the_key_is_known():
    answer = call(only_with_key(echo, BOTH), "/v1/chat/completions", "POST", {"content-length": "900000"}, [b"x"] * 9)
    assert (answer.status, answer.code, answer.reads) == (401, "invalid_api_key", 0)
    assert (answer.headers["www-authenticate"], answer.headers["connection"]) == ("Bearer", "close")


def test_keys_are_not_shown():
    assert USE not in repr(BOTH)
    assert USE not in str(BOTH)


def test_keys_come_from_a_file_or_else_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# for the web page\n{USE}\n\n  {OTHER}  \n")
    file.chmod(0o600)
    assert read_keys(file, "KEY", "--api-key-file", {"KEY": MANAGE}) == (USE, OTHER)
    assert read_keys(None, "KEY", "--api-key-file", {"KEY": MANAGE}) == (MANAGE,)
    assert read_keys(None, "KEY", "--api-key-file", {"KEY": ""}) == ()
    assert read_keys(None, "KEY", "--api-key-file", {}) == ()


@pytest.mark.parametrize(
    "text", ["", "# only a remark\n", "short\n", "with blanks in between it\n", "ümlaut-0123456789abc"]
)
def test_a_file_without_a_good_key_is_refused_with_a_way_to_make_one(tmp_path, text):
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf8")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="token_urlsafe") as caught:
        read_keys(file, "KEY", "--api-key-file")
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--api-key-file .*gone: the file cannot be read: No such file"):
        read_keys(tmp_path / "gone", "KEY", "--api-key-file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        read_keys(tmp_path / "binary", "KEY", "--api-key-file")


@pytest.mark.skipif(os.name != "posix", reason="permissions of other users are Unix's")
def test_a_file_that_others_can_read_is_noted(tmp_path):
    file = tmp_path / "keys"
    file.write_text(USE)
    file.chmod(0o644)
    with pytest.warns(LorakitWarning, match="chmod 600"):
        assert read_keys(file, "KEY", "--api-key-file") == (USE,)
