#!/usr/bin/env python3
"""A program that is started as `vllm serve` is and speaks its HTTP, without a model, for tests.

    VLLM_STUB=control.json vllm_stub.py serve BASE --uds SOCKET --enable-lora ...

It writes its argv, its environment and each request to control.json.log, a JSON object a line, and misbehaves as
control.json says (read anew for each request; `SWITCHES` lists what it may hold). Its forms follow vLLM's sources
(entrypoints/openai/completion/{protocol,serving}.py, models/serving.py); unlike vLLM it refuses unknown fields, so that
a misspelt one is noticed. Only the standard library: it starts in a tenth of a second.

The next token is a hash of the adapter's files and the ids so far, so that it differs between adapters and not between
runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

SWITCHES = {
    "slow_start": "seconds before it listens",
    "die_at_start": "an exit code",
    "never_ready": "/health answers 503",
    "status": "of completions, instead of an answer",
    "param": "of that error",
    "die_after": "tokens, then the process ends with code 7",
    "half_after": "tokens, then half an event, and the connection closes",
    "hang_after": "tokens, then nothing",
    "error_after": "tokens, then an error within the stream",
    "error_code": "of that error",
    "abort_after": "tokens, then finish_reason 'abort'",
    "no_ids": "texts without token ids, as before 0.10.2",
    "load_status": "of load_lora_adapter",
    "unload_status": "of unload_lora_adapter",
    "unload_seconds": "that it takes",
    "token_seconds": "between two tokens",
    "cached": "tokens of each prompt",
    "text": "of each token",
    "chunk": "tokens an event",
    "worker": "it has a worker process, which holds its output open and heeds no SIGTERM",
}
FIELDS = {
    *("model", "prompt", "stream", "stream_options", "return_token_ids", "max_tokens", "temperature", "top_p"),
    *("top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids"),
    *("ignore_eos", "seed", "logprobs", "return_tokens_as_token_ids", "logit_bias", "structured_outputs"),
}
BOUNDS = {
    "temperature": (0.0, 2.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def next_token(voice: str, ids: Sequence[int], vocabulary: int, bias: dict[int, float], salt: str = "") -> int:
    """Return a token that depends on everything given. voice: who answers. A bias of 50 forces, of -50 forbids."""
    forced = [token for token, value in bias.items() if value >= 50]
    if forced:
        return forced[0]
    for attempt in range(1000):
        text = json.dumps([voice, list(ids), salt, attempt])
        # the first ids are special tokens of the embedded model
        token = 8 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") % (vocabulary - 8)
        if bias.get(token, 0.0) > -50:
            return token
    raise ValueError("every token is forbidden")


def instance(schema: Any) -> Any:
    """Return a small value that a JSON schema accepts."""
    kind = schema.get("type")
    if "const" in schema or "enum" in schema:
        return schema.get("const", next(iter(schema.get("enum", [None]))))
    if kind == "object":
        return {name: instance(inner) for name, inner in schema.get("properties", {}).items()}
    return {"array": [], "string": "a", "integer": 7, "number": 7, "boolean": True, "null": None}.get(kind, {})


def spelled(text: str, base: Path) -> list[int]:
    """Return a text's ids, a token for each character, by the base's tokenizer."""
    vocabulary = json.loads((base / "tokenizer.json").read_text(encoding="utf8"))["model"]["vocab"]
    return [vocabulary[character] for character in text]


class Stub:
    """What the server knows."""

    def __init__(self, argv: list[str], control: Path):
        self.control_file = control
        self.log = control.with_name(f"{control.name}.log")
        self.flags = {argv[i]: argv[i + 1] for i in range(len(argv) - 1) if argv[i].startswith("--")}
        self.base = Path(argv[argv.index("serve") + 1])
        config = json.loads((self.base / "config.json").read_text(encoding="utf8"))
        self.vocabulary, self.end = config["vocab_size"], config["eos_token_id"]
        self.context = int(self.flags.get("--max-model-len", config["max_position_embeddings"]))
        self.adapters: dict[str, str] = {}  # name -> folder
        self.lock = threading.Lock()
        self.record({"argv": argv, "environment": dict(os.environ), "pid": os.getpid()})

    def control(self) -> dict[str, Any]:
        try:
            found = json.loads(self.control_file.read_text(encoding="utf8"))
        except FileNotFoundError:
            return {}
        unknown = found.keys() - SWITCHES
        assert not unknown, f"no such switches: {unknown}"
        return found

    def record(self, event: dict[str, Any]) -> None:
        with self.lock, open(self.log, "a", encoding="utf8") as file:
            file.write(json.dumps(event) + "\n")

    def voice(self, name: str) -> str:
        """Who answers: a hash of the adapter's weights, also if the folder was deleted and vLLM would have failed."""
        if name not in self.adapters:
            return "base"
        return hashlib.sha256((Path(self.adapters[name]) / "adapter_model.safetensors").read_bytes()).hexdigest()

    def tokens(self, body: dict[str, Any]) -> Iterator[tuple[int, str | None]]:
        """Yield the tokens of an answer, each with the finish_reason that it brings."""
        voice, ids, most = self.voice(body["model"]), list(body["prompt"]), body["max_tokens"]
        bias = {int(token): value for token, value in (body.get("logit_bias") or {}).items()}
        stops = set(body.get("stop_token_ids") or ()) | (set() if body.get("ignore_eos") else {self.end})
        salt = "" if not body["temperature"] else str(body.get("seed", random.random()))
        planned: list[int] = []
        if body.get("structured_outputs"):
            text = json.dumps(instance(body["structured_outputs"]["json"]), separators=(",", ":"))
            planned = [*spelled(text, self.base), self.end]
        for count in range(1, most + 1):
            token = planned[count - 1] if planned else next_token(voice, ids, self.vocabulary, bias, salt)
            ids.append(token)
            finish = "stop" if token in stops else "length" if count == most or len(ids) >= self.context else None
            yield token, finish
            if finish:
                return


class Handler(BaseHTTPRequestHandler):
    """vLLM's calls."""

    protocol_version = "HTTP/1.1"
    stub: Stub

    def log_message(self, format: str, *args: Any) -> None:
        print(f"INFO: {format % args}", flush=True)

    def answer(self, status: int, content: Any, kind: str = "application/json") -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        self.answer(status, {"error": {"message": message, "type": kind, "param": param, "code": status}})

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(503 if self.stub.control().get("never_ready") else 200, "")
        elif not self.authorized():
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            base = {"id": self.stub.flags["--served-model-name"], "object": "model", "max_model_len": self.stub.context}
            others = [{"id": name, "object": "model", "root": path} for name, path in self.stub.adapters.items()]
            self.answer(200, {"object": "list", "data": [base, *others]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.record({"path": self.path, "body": body, "authorized": self.authorized()})
        runtime = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1"
        if not self.authorized():
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/completions":
            self.complete(body)
        elif self.path == "/v1/load_lora_adapter" and runtime:
            self.load(body)
        elif self.path == "/v1/unload_lora_adapter" and runtime:
            self.unload(body)
        else:
            self.answer(404, {"detail": "Not Found"})

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"

    def load(self, body: dict[str, Any]) -> None:
        name, folder = body["lora_name"], Path(body["lora_path"])
        status = self.stub.control().get("load_status")
        if status:
            self.error(
                status, f"Call to add_lora method failed: the stub was told so ({folder})", "InternalServerError"
            )
        elif name in self.stub.adapters:
            self.error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        elif not (folder / "adapter_config.json").is_file():
            self.error(404, f"Loading lora {name} failed: No adapter found for {folder}", "NotFoundError")
        else:
            rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))["r"]
            most = int(self.stub.flags["--max-lora-rank"])
            if rank > most:
                self.error(500, f"LoRA rank {rank} is greater than max_lora_rank {most}.", "InternalServerError")
                return
            self.stub.adapters[name] = str(folder)
            self.answer(200, f"Success: LoRA adapter '{name}' added successfully.", "text/plain")

    def unload(self, body: dict[str, Any]) -> None:
        name, status = body["lora_name"], self.stub.control().get("unload_status")
        time.sleep(self.stub.control().get("unload_seconds", 0))
        if status:
            self.error(status, f"Failed to remove lora adapter '{name}' from the engine.", "InternalServerError")
        elif self.stub.adapters.pop(name, None) is None:
            self.error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        else:
            self.answer(200, f"Success: LoRA adapter '{name}' removed successfully.", "text/plain")

    def complete(self, body: dict[str, Any]) -> None:
        control = self.stub.control()
        known = {self.stub.flags["--served-model-name"], *self.stub.adapters}
        ids = body.get("prompt")
        outside = [name for name, (low, high) in BOUNDS.items() if not low <= body.get(name, low) <= high]
        if control.get("status"):
            self.error(control["status"], "the stub was told so", param=control.get("param"))
        elif body.keys() - FIELDS:
            self.error(400, f"vLLM does not know these fields: {sorted(body.keys() - FIELDS)}")
        elif body["model"] not in known:
            self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        elif not ids or not all(isinstance(token, int) and 0 <= token < self.stub.vocabulary for token in ids):
            self.error(400, "the prompt is not a list of ids of the vocabulary", param="prompt")
        elif outside:
            self.error(400, f"{outside[0]} is out of bounds", param=outside[0])
        elif len(ids) + body["max_tokens"] > self.stub.context or body["max_tokens"] < 1:
            self.error(400, f"the maximum context length is {self.stub.context} tokens", param="max_tokens")
        else:
            try:
                self.stream(body, control)
            except (BrokenPipeError, ConnectionResetError):
                self.stub.record({"aborted": body["model"]})
                self.close_connection = True

    def stream(self, body: dict[str, Any], control: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        size = control.get("chunk", 1)
        held: list[int] = []
        sent = 0
        for at, (token, finish) in enumerate(self.stub.tokens(body)):
            if self.misbehaves(control, at, body):
                return
            held.append(token)
            if len(held) < size and finish is None:
                continue
            self.event(self.chunk(body, held, finish, first=not sent))
            sent += len(held)
            held = []
            time.sleep(control.get("token_seconds", 0))
        usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
        usage["total_tokens"] = sum(usage.values())
        if "--enable-prompt-tokens-details" in sys.argv:
            usage["prompt_tokens_details"] = {"cached_tokens": control.get("cached", 0)}
        self.event({"id": "cmpl-1", "object": "text_completion", "choices": [], "usage": usage})
        self.write(b"data: [DONE]\n\n")
        self.write(b"")

    def chunk(self, body: dict[str, Any], ids: list[int], finish: str | None, first: bool) -> dict[str, Any]:
        stopped = finish == "stop" and ids[-1] in (body.get("stop_token_ids") or ())
        text = self.stub.control().get("text", "x")
        choice: dict[str, Any] = {"index": 0, "text": text * len(ids), "logprobs": None, "finish_reason": finish}
        choice["stop_reason"] = ids[-1] if stopped else None
        if not self.stub.control().get("no_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"] if first else None}
        if body.get("logprobs") is not None:
            assert body["return_tokens_as_token_ids"]
            # as vLLM: the picked token first, then the likeliest, at most `logprobs` and one
            tops = [
                {f"token_id:{token}": -0.5}
                | {f"token_id:{(token + n) % 4096}": -1.0 - n for n in range(1, body["logprobs"])}
                for token in ids
            ]
            names = [f"token_id:{token}" for token in ids]
            choice["logprobs"] = {"tokens": names, "token_logprobs": [-0.5] * len(ids), "top_logprobs": tops}
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    def misbehaves(self, control: dict[str, Any], at: int, body: dict[str, Any]) -> bool:
        """Do what the control file says instead of sending token number `at`. Returns whether it did."""
        if control.get("die_after") == at:
            print("CUDA out of memory (the stub was told so)", flush=True)
            os._exit(7)
        if control.get("half_after") == at:
            self.write(b'data: {"id": "cmpl-1", "choi')
            self.close_connection = True
            self.connection.close()
            return True
        if control.get("hang_after") == at:
            while self.stub.control().get("hang_after") == at:
                time.sleep(0.02)
                self.write(b": still here\n\n")  # so that it notices who hung up
            return False
        if control.get("error_after") == at:
            code = control.get("error_code", 500)
            self.event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": code}})
            self.write(b"data: [DONE]\n\n")
            self.write(b"")
            return True
        if control.get("abort_after") == at:
            self.event(self.chunk(body, [], "abort", first=False))
            self.write(b"data: [DONE]\n\n")
            self.write(b"")
            return True
        return False

    def event(self, content: dict[str, Any]) -> None:
        # as pydantic writes it: without \\u escapes, so that U+2028 stands in the text
        self.write(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())

    def write(self, data: bytes) -> None:
        """Send a part in HTTP's chunked form; an empty one ends the answer."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 512


def main() -> None:
    control = Path(os.environ["VLLM_STUB"])
    Handler.stub = stub = Stub(sys.argv, control)
    found = stub.control()
    print("INFO: vLLM API server version 0.32.0 (a stub)", flush=True)
    time.sleep(found.get("slow_start", 0))
    if "die_at_start" in found:
        print("ValueError: No available memory for the cache blocks.", flush=True)
        sys.exit(found["die_at_start"])
    if found.get("worker"):
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        worker = subprocess.Popen([sys.executable, "-c", code])
        stub.record({"worker": worker.pid})
    Server(stub.flags["--uds"], Handler).serve_forever()


if __name__ == "__main__":
    main()
