"""A hub that does not answer is noticed at once, and names that are here or in the cache are never asked about."""

from __future__ import annotations

import socket
import time

import pytest

from lorakit.bases import hub_reach
from lorakit.bases.hub_reach import check_hub, out_of_reach
from lorakit.errors import LorakitError


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_name_that_is_nowhere_is_an_error_at_once(tmp_path):
    (tmp_path / "model").mkdir()
    started = time.monotonic()
    for name in ("foo/bar", "modell"):
        with pytest.raises(
            LorakitError, match=f"there is no '{name}' here.* the hub cannot be reached: .*refused"
        ) as error:
            check_hub(name, "a model folder")
    assert "did you mean 'model'?" in str(error.value)
    assert "expected a model folder" in str(error.value)
    assert time.monotonic() - started < 1


def test_what_is_here_or_cached_or_no_hub_id_is_not_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_reach, "out_of_reach", lambda: pytest.fail("asked"))
    (tmp_path / "here").mkdir()
    (tmp_path / "cache" / "hub" / "models--foo--bar").mkdir(parents=True)
    (tmp_path / "cache" / "hub" / "datasets--a--b").mkdir()
    for name, kind in (("here", "models"), ("foo/bar", "models"), ("foo/bar@v1", "models"), ("./x", "models")):
        check_hub(name, "x", kind)
    check_hub("a/b", "x", "datasets")


def test_a_hub_that_answers_is_reached_directly_or_through_a_proxy(server, monkeypatch):
    assert "refused" in out_of_reach()
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert out_of_reach() is None
    check_hub("foo/bar", "x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert out_of_reach() == "HF_HUB_OFFLINE is set"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", server)
    monkeypatch.setenv("http_proxy", server)
    assert out_of_reach() is None


def test_a_hub_that_says_nothing_is_given_up_on(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_: time.sleep(3))
    started = time.monotonic()
    assert "did not answer within" in out_of_reach()
    assert time.monotonic() - started < 1.5
