"""`lorakit serve`: what it refuses before anything is loaded, each with the way out."""

from __future__ import annotations

import importlib.util

import pytest

from lorakit.cli.serve import example_for, name_of_adapter
from lorakit.data.chat_record import ChatRecord
from lorakit.serve.card import Card
from lorakit.serve.server import listen

KEY = "use-0123456789abcdef"


@pytest.fixture
def refused(lorakit, monkeypatch):
    for name in ("LORAKIT_API_KEY", "LORAKIT_MANAGE_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*args, code=2):
        got, out, err = lorakit("serve", "embedded", "--port", "0", *args)
        assert (got, out) == (code, "")
        return err

    return call


def test_beyond_this_machine_it_needs_a_key(refused):
    error = refused("--host", "0.0.0.0")
    assert "--host 0.0.0.0: beyond this machine, everybody" in error
    assert "--api-key-file" in error


def test_a_manage_key_alone_is_not_enough_beyond_this_machine(refused, monkeypatch):
    monkeypatch.setenv("LORAKIT_MANAGE_KEY", KEY)
    assert "beyond this machine" in refused("--host", "0.0.0.0")


@pytest.mark.parametrize("flag", ["--allow-host", "--cors-origin"])
def test_every_name_and_origin_are_allowed_only_with_a_key(refused, flag):
    assert f"{flag} *: any web page could then use the models" in refused(flag, "*")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--api-key-file", "gone"], "--api-key-file gone: the file cannot be read"),
        (["--allow-host", "http://x"], "--allow-host http://x: not a host's name"),
        (["--cors-origin", "x"], "--cors-origin x: not an origin"),
        (["--adapter-memory", "much"], "--adapter-memory: 'much' is not an amount of memory"),
        (["--prefix-memory", "0"], "--prefix-memory: '0' is not an amount of memory"),
        (["--engine", "vllm"], "give its command: --vllm"),
        (["--vllm", "vllm"], "--vllm is for --engine vllm"),
        (["--max-rank", "16"], "--max-rank is for --engine vllm"),
        (["--vllm-arg=-x"], "--vllm-arg is for --engine vllm"),
        (["--adapter", "a=x", "--adapter", "a=y"], "two adapters are named 'a'"),
        (["--host", "no.such.host.invalid"], "there is no such address"),
        (["--port", "70000"], "65535"),
        (["--max-prompt", "0"], "--max-prompt"),
        (["--max-answer", "-1"], "--max-answer"),
        (["--adpter", "x"], "--adapter"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_loaded(refused, args, message):
    assert message in refused(*args)


def test_a_taken_port_is_refused_with_another(refused):
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        error = refused("--port", str(port))
    assert f"127.0.0.1:{port} cannot be used" in error
    assert "or --port 0" in error


def test_without_the_extra_it_says_what_to_install(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("lorakit.serve.start.find_spec", lambda name: None if name == "uvicorn" else find(name))
    error = refused(code=1)
    assert "not installed: uvicorn" in error
    assert "pip install 'lorakit[serve]'" in error


@pytest.mark.parametrize(
    "path, name",
    [
        ("runs/sql/adapter", "sql"),
        ("runs/sql/adapter/", "sql"),
        ("runs/sql", "sql"),
        ("one.safetensors", "one"),
        ("owner/name@v1", "owner/name"),
        ("hf://owner/name", "owner/name"),
        ("gone/far/away", "away"),
    ],
)
def test_a_path_without_a_name_is_named_as_its_folder(path, name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "sql" / "adapter").mkdir(parents=True)
    (tmp_path / "one.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert name_of_adapter(path) == name


def test_a_broken_state_file_is_said_before_the_model_is_loaded(refused, tmp_path, monkeypatch):
    def build(settings):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lorakit.serve.embedded.build.build", build)
    state = tmp_path / "state.json"
    state.write_text("{")
    assert "mend it, or move it away" in refused("--state", str(state))
    assert state.read_text() == "{"


def test_the_example_suits_what_the_adapter_was_trained_on():
    card = Card("e2e", "e2e", 0, chat=ChatRecord(style="none"))
    assert example_for(card) == ("completions", {"prompt": "your prompt"})
    for chats in (None, Card("sql", "sql", 0), Card("sql", "sql", 0, chat=ChatRecord(style="chat"))):
        assert example_for(chats)[0] == "chat/completions"
