"""`lorakit serve` as a user meets it: the embedded model, adapters, the printed command, the openai client, SIGTERM."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest
import torch

import lorakit as lk

pytestmark = pytest.mark.skipif(os.name != "posix", reason="it is stopped as Unix does")
ROOT = Path(__file__).parent.parent.parent
KEY, MANAGE = "use-0123456789abcdef", "manage-0123456789abcdef"


class Command:
    """The running command: its two lines, its URL, and its log once it has stopped."""

    def __init__(self, *args: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorakit", "serve", "embedded", "--port", "0", *args], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LORAKIT_API_KEY": KEY, "LORAKIT_MANAGE_KEY": MANAGE},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.ready, self.next = (self.process.stdout.readline().strip() for _ in range(2))
        self.url = self.ready.rpartition(" at ")[2].removesuffix("/v1")

    def openai(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the adapters "one" and "team/two" of the embedded model."""
    made = tmp_path_factory.mktemp("adapters")
    model = lk.load_base("embedded", dtype="fp32", device="cpu")
    for seed, name in enumerate(("one", "team/two")):
        torch.manual_seed(seed)
        lk.attach(model, lk.LoraConfig(rank=4, targets="all-linear"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.2)
        lk.capture(model).save(made / name)
        lk.detach(model)
    return made


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    state = tmp_path_factory.mktemp("state") / "loaded.json"
    running = Command("--adapter", f"mine={folder / 'one'}", "--adapters", str(folder), "--state", str(state))
    assert running.ready, running.process.communicate(timeout=60)[1]
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.communicate()


def test_it_says_where_it_is_and_what_to_ask(command):
    assert command.ready.startswith("serving embedded and 3 adapters at http://127.0.0.1:")
    assert command.next.startswith(f"next: curl {command.url}/v1/chat/completions ")


def test_the_command_that_it_prints_gets_an_answer(command):
    words = shlex.split(command.next.removeprefix("next: ").replace("$LORAKIT_API_KEY", KEY))
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    answer = httpx2.post(words[1], content=words[words.index("-d") + 1], headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "mine"
    assert answer.headers["x-lorakit-adapter"].startswith("mine@")


def test_each_name_gets_its_own_adapters_answer(command):
    client = command.openai()
    assert {model.id for model in client.models.list()} == {"embedded", "mine", "one", "team/two"}
    texts = {}
    for model in ("embedded", "mine", "one", "embedded:one", "team/two", "one:0.5+team/two:0.5"):
        answer = client.completions.create(model=model, prompt="The old man", max_tokens=12, temperature=0)
        texts[model] = answer.choices[0].text
    assert texts["mine"] == texts["one"] == texts["embedded:one"]  # the same files
    assert len(set(texts.values())) == 4


def test_a_stream_has_the_text_of_the_whole_answer(command):
    ask = {"model": "mine", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
    client = command.openai()
    chunks = list(client.chat.completions.create(**ask, stream=True))
    whole = client.chat.completions.create(**ask)
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == whole.choices[0].message.content


def test_the_keys_are_for_what_they_are_for(command):
    with pytest.raises(openai.AuthenticationError):
        command.openai("wrong-0123456789abcdef").models.list()
    load = {"lora_name": "later", "lora_path": "one"}
    statuses = [
        httpx2.post(f"{command.url}/v1/load_lora_adapter", json=load, headers=headers).status_code
        for headers in ({"authorization": f"Bearer {key}"} for key in (KEY, MANAGE))
    ]  # fmt: skip
    assert statuses == [403, 200]
    page = httpx2.get(f"{command.url}/metrics", headers={"authorization": f"Bearer {MANAGE}"}).text
    assert 'lorakit_http_requests_total{method="POST",path="/v1/load_lora_adapter",status="200"} 1.0' in page
    assert httpx2.get(f"{command.url}/health").json()["status"] == "ok"


def test_a_schema_is_kept(command):
    """llguidance comes with the extra, and the command gives it to the engine."""
    form = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = command.openai().completions.create(
        model="mine", prompt="A number:", max_tokens=40, temperature=0,
        extra_body={"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": form}}},
    )  # fmt: skip
    assert answer.choices[0].text.startswith('{"n"')


def test_it_stops_cleanly_and_its_log_has_neither_prompts_nor_keys(command):
    code, log = command.stop()
    assert code == 0
    assert '"POST /v1/completions" 200 ' in log
    assert log.splitlines()[-1] == "lorakit: stopped by SIGTERM"
    for word in ("Traceback", "old man", "Hello", KEY, MANAGE):
        assert word not in log


def test_an_adapter_that_cannot_be_served_ends_the_command(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    running = Command("--adapter", f"broken={tmp_path / 'broken'}")
    _, log = running.process.communicate(timeout=60)
    assert running.process.returncode == 1
    assert running.ready == ""
    assert "Traceback" not in log
    assert "broken" in log.splitlines()[-1] or "broken" in log
