"""What can go wrong around `lorakit serve`, done to a real server with the embedded model while others use it.

    python scripts/serve_faults.py [--requests 10000] [--seed 0] [--only mutated,kill]

Each part says how much of what was tried and what came of it. While they run, witnesses stream greedy answers from the
base, two adapters and a mix of them, and compare them with those of the quiet server. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import random
import resource
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from faults.adapters import PLACES, break_copies, make, template_bombs
from faults.mutations import GARBAGE, mutated
from faults.process import Server
from faults.pulse import Pulse
from faults.witnesses import Witnesses, answer

MODELS = ("embedded", "a", "b", "a:0.7+b:0.3")
READY_SECONDS = 5.0  # for a restart on an idle machine, imports of torch and transformers included
# In bf16 an answer's rounding depends on how many rows are computed at once: a greedy answer may turn at a near-tie.
FLAGS = ["--precision", "fp32", "--prefix-memory", "16MB", "--no-access-log"]
GROWTH = 1.05  # of resident memory over the second half of the mutated requests
THREADS = 6
# Seconds that a row may stay taken after its client left: a step, which may have 0.5 s of prompts, on a busy machine.
A_STEP = 2.0
LONGEST_PULSE = 3.0  # seconds for /health on a busy machine, whatever bodies come meanwhile


@dataclass
class Report:
    """What was found. `failures`: lines that say what, at most a few of each part."""

    failures: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)
            print(f"  FAILED: {what[:600]}")


@dataclass
class Bench:
    """Server, its folders and its witnesses, as every part gets them."""

    server: Server
    root: Path
    state: Path
    witnesses: Witnesses
    report: Report
    requests: int
    seed: int

    def beside(self, name: str, act: Callable[[], str]) -> None:
        """Run a part while the witnesses ask, and print its line."""
        before = self.witnesses.answers, len(self.witnesses.changed), len(self.witnesses.failed)
        began = time.monotonic()
        with self.witnesses:
            line = act()
        count = self.witnesses.answers - before[0]
        changed, failed = self.witnesses.changed[before[1] :], self.witnesses.failed[before[2] :]
        print(f"{name:<10} {line}; beside it {count} answers of others, {len(changed)} changed, {len(failed)} failed "
              f"({time.monotonic() - began:.0f} s)")  # fmt: skip
        self.report.check(self.server.alive(), f"{name}: the server died: {self.server.said()}")
        self.report.check(not changed, f"{name}: answers changed: {changed[:2]}")
        self.report.check(not failed, f"{name}: answers failed: {failed[:2]}")
        self.report.check(count > 0, f"{name}: no other client was answered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="mutated requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"parts, separated by commas: {', '.join(PARTS)}")
    asked = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, state = folder / "adapters", folder / "state.json"
        root.mkdir()
        make(root, ["a", "b", "c"])
        server = Server(["embedded", "--adapters", str(root), "--state", str(state), "--rows", "16", *FLAGS])
        try:
            print(f"ready after {server.seconds:.1f} s, {server.rss() / 1e6:.0f} MB")
            witnesses = Witnesses(server, MODELS)
            bench = Bench(server, root, state, witnesses, report, asked.requests, asked.seed)
            for part in asked.only.split(",") if asked.only else PARTS:
                PARTS[part](bench)
            code, seconds = server.stop()
            report.check(code == 0, f"stopped with exit code {code}: {server.said()}")
            print(f"stopped in {seconds:.1f} s")
            shown = server.said()
            report.check("Traceback" not in shown and "Error" not in shown, f"in the log: {shown[-1500:]}")
        finally:
            server.kill()
    print(f"{len(report.failures)} failures")
    sys.exit(1 if report.failures else 0)


# ------------------------------------------------------------------------------------------------ the parts


def mutated_requests(bench: Bench) -> None:
    """Requests mutated at random, and bytes that are no HTTP."""
    server, statuses, broken = bench.server, collections.Counter[str](), list[str]()
    rng, lock = random.Random(bench.seed), threading.Lock()
    left, sizes = [bench.requests], list[int]()

    def work() -> None:
        while True:
            with lock:
                if not left[0]:
                    return
                left[0] -= 1
                bad = mutated(rng)
            try:
                connection = server.connect(300)
                connection.request(bad.method, bad.path, bad.body, {"content-type": "application/json", **bad.headers})
                reply = connection.getresponse()
                body = reply.read()
                connection.close()
                status = str(reply.status)
                if reply.status >= 500 or (reply.status >= 400 and not _is_error(bad.method, body)):
                    broken.append(f"{bad.method} {bad.path} {bad.body[:300]!r} {bad.headers}: {status} {body[:200]!r}")
                if str(bench.root.parent).encode() in body or b"Traceback" in body:
                    broken.append(f"{bad.path} {bad.body[:300]!r}: shows {body[:300]!r}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                status = type(error).__name__
                # http.client refuses to send some; a header that is none ends the connection, body unread.
                if not isinstance(error, ValueError) and bad.headers.get("x-request-id") != "\x01":
                    broken.append(f"{bad.headers} {bad.method} {bad.path} {bad.body[:300]!r}: {error!r}")
            with lock:
                statuses[status] += 1
                if statuses.total() == bench.requests // 2:
                    sizes.append(server.rss())

    def act() -> str:
        sizes.append(server.rss())
        pulse = Pulse(server)
        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        with pulse:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        longest = f"/health took up to {pulse.longest:.2f} s of {pulse.count}"
        bench.report.check(pulse.longest < LONGEST_PULSE, f"mutated: {longest}: a body held up all others")
        for data in GARBAGE * 20:
            with contextlib.suppress(OSError), socket.create_connection((server.host, server.port), 5) as raw:
                raw.sendall(data)
                raw.settimeout(0.05)
                raw.recv(1000)
        sizes.append(server.rss())
        bench.report.check(not broken, f"mutated: {len(broken)} answered badly: {broken[:3]}")
        shown = " -> ".join(f"{size / 1e6:.0f}" for size in sizes)
        bench.report.check(sizes[-1] < GROWTH * sizes[1], f"mutated: memory grew to the end: {shown} MB")
        counts = ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items()))
        return (f"{bench.requests:,} requests ({counts}), {len(GARBAGE) * 20} times no HTTP; {longest}; "
                f"memory before, half through, after: {shown} MB")  # fmt: skip

    bench.beside("mutated", act)


def _is_error(method: str, body: bytes) -> bool:
    """Whether a body is an error object, as OpenAI's. The HTTP parser's own refusals are not ours to shape."""
    if method == "HEAD" or body == b"Invalid HTTP request received.":
        return True
    try:
        return isinstance(json.loads(body)["error"]["message"], str)
    except (ValueError, TypeError, KeyError):
        return False


def _long(stream: bool, **more: int) -> bytes:
    body = {"model": "a", "prompt": "Once", "max_tokens": 400, "stream": stream, "ignore_eos": True, "n": 4, **more}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _idle(bench: Bench, what: str, bound: float) -> float:
    """Wait until no request runs. Return the seconds; a failure if it takes longer than `bound`."""
    began = time.monotonic()
    while bench.server.metric("lorakit_requests_running") + bench.server.metric("lorakit_requests_waiting") > 0:
        if time.monotonic() > began + bound:
            bench.report.check(False, f"{what}: rows are still taken after {bound} s")
            break
        time.sleep(0.02)
    return time.monotonic() - began


def hang_ups(bench: Bench, count: int = 50) -> None:
    """Clients that leave in the middle: politely or by a reset, streamed or not, in a row or in the queue."""

    def act() -> str:
        for at in range(count):
            raw = socket.create_connection((bench.server.host, bench.server.port), 10)
            raw.sendall(_long(stream=at % 2 == 0))
            raw.settimeout(10)
            if at % 2 == 0 and at % 3:
                raw.recv(200)
            else:
                time.sleep(0.05)
            if at % 4 < 2:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()
        return f"{count} clients left during 4 answers of 400 tokens each"

    bench.beside("hang-ups", act)
    print(f"{'':<10} all rows were free {_idle(bench, 'hang-ups', A_STEP):.2f} s after the last client")


def unread(bench: Bench, count: int = 6) -> None:
    """Clients that ask for streams and take nothing."""
    unread_clients: list[socket.socket] = []

    def act() -> str:
        for _ in range(count):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.connect((bench.server.host, bench.server.port))
            raw.sendall(_long(stream=True, logprobs=9))
            unread_clients.append(raw)
        time.sleep(3)
        return f"{count} clients asked for 4 streams each and read nothing"

    bench.beside("unread", act)
    print(f"{'':<10} all rows were free {_idle(bench, 'unread', 90):.1f} s later, with the clients still connected")
    for raw in unread_clients:
        raw.close()


def broken_files(bench: Bench) -> None:
    """Adapters that are damaged, do not fit, or are not what they seem; places that lead elsewhere."""
    names = break_copies(bench.root / "c", bench.root)
    before = len(bench.server.models())

    def act() -> str:
        statuses = collections.Counter[int]()
        for at, place in enumerate([*names, *PLACES]):
            status, body = bench.server.ask(
                "POST", "/v1/load_lora_adapter", {"lora_name": f"bad-{at}", "lora_path": place}
            )
            statuses[status] += 1
            bench.report.check(400 <= status < 500, f"files: {place[:50]!r} answered {status} {body[:200]!r}")
            for secret in (str(bench.root), "root:x:", "Traceback"):
                bench.report.check(secret not in body.decode(), f"files: {place[:50]!r} shows {secret}: {body[:300]!r}")
        for name in names:
            status, body = bench.server.ask("POST", "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})
            statuses[status] += 1
            bench.report.check(400 <= status < 500, f"files: model {name} answered {status} {body[:200]!r}")
        listed = {model["id"] for model in bench.server.models()}
        bench.report.check(not listed & {f"bad-{n}" for n in range(99)}, f"files: broken ones are listed: {listed}")
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        return f"{len(names)} broken adapters, twice, and {len(PLACES)} places ({counts}); {before} models before"

    bench.beside("files", act)
    for name in names:
        path = bench.root / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def templates(bench: Bench) -> None:
    """Adapters whose own chat template is an attack."""
    names = template_bombs(bench.root / "c", bench.root)

    def act() -> str:
        slowest = 0.0
        for name in names:
            body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            began = time.monotonic()
            status, answered = bench.server.ask("POST", "/v1/chat/completions", body)
            slowest = max(slowest, time.monotonic() - began)
            bench.report.check(400 <= status < 500, f"templates: {name} answered {status} {answered[:200]!r}")
        bench.report.check(slowest < 30, f"templates: one took {slowest:.0f} s")
        return f"{len(names)} templates, each refused within {slowest:.1f} s"

    bench.beside("templates", act)
    for name in names:
        shutil.rmtree(bench.root / name)


def killed(bench: Bench, times: int = 3) -> None:
    """kill -9 while it answers and loads; started again with the same state file it has the same models."""
    server = bench.server
    for at in range(2):
        status, body = server.ask("POST", "/v1/load_lora_adapter", {"lora_name": f"loaded/{at}", "lora_path": "c"})
        bench.report.check(status == 200, f"kill: loading answered {status} {body[:200]!r}")
    models, expected = _lasting(server), bench.witnesses.expected
    fastest = cpu = float("inf")
    for at in range(times):
        with bench.witnesses:
            load = {"lora_name": f"half/{at}", "lora_path": "c"}
            loading = threading.Thread(target=_quietly, args=(server, load))
            loading.start()
            time.sleep(0.02 * at)
            server.kill()
            loading.join()
        server.restart()
        fastest, cpu = min(fastest, server.seconds), min(cpu, server.cpu_seconds)
        now = _lasting(server)
        bench.report.check(now == models, f"kill: other models after the restart: {now} instead of {models}")
        for (model, prompt), text in expected.items():
            bench.report.check(
                answer(server, model, prompt) == text, f"kill: {model} answers otherwise after a restart"
            )
    bench.witnesses.failed.clear()
    bench.report.check(fastest < READY_SECONDS, f"kill: ready only after {fastest:.1f} s; is the machine busy?")
    print(f"{'kill -9':<10} {times} times while it answered and loaded; ready again after {fastest:.1f} s at best, "
          f"with {cpu:.1f} s of processor time; same models ({len(models)}), "
          f"same answers ({times * len(expected)})")  # fmt: skip


def _lasting(server: Server) -> list[dict[str, Any]]:
    """Return /v1/models without those whose folders are gone, and whose loading was cut."""
    return [model for model in server.models() if not model["id"].startswith(("half/", "template-"))]


def _quietly(server: Server, load: dict[str, str]) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.ask("POST", "/v1/load_lora_adapter", load)


def full_disk(bench: Bench) -> None:
    """A disk that takes nothing more: what was there stays, the server goes on and says what is wrong."""
    state = bench.state.with_name("full.json")
    shutil.copy(bench.state, state) if bench.state.exists() else None
    before = state.read_bytes() if state.exists() else None

    server = Server(["embedded", "--adapters", str(bench.root), "--state", str(state), *FLAGS])
    try:
        expected = bench.witnesses.expected["a", "She said"]
        bench.report.check(answer(server, "a", "She said") == expected, "full disk: another answer before")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))  # writes fail as on a full disk
        names = [f"more/{at}" for at in range(5)]
        answered = [server.ask("POST", "/v1/load_lora_adapter", {"lora_name": n, "lora_path": "c"}) for n in names]
        bench.report.check(all(status != 200 for status, _ in answered), f"full disk: not said: {answered[:2]}")
        bench.report.check(
            (state.read_bytes() if state.exists() else None) == before, "full disk: the state file changed"
        )
        listed = {model["id"] for model in server.models()}
        bench.report.check(not listed & set(names), f"full disk: a name that will be lost is listed: {listed}")
        bench.report.check(answer(server, "a", "She said") == expected, "full disk: another answer")
        print(f"{'full disk':<10} {len(names)} loads, answered {sorted({status for status, _ in answered})} "
              f"{json.loads(answered[0][1])['error']['message'][:120]!r}; the state file is as it was")  # fmt: skip
    except RuntimeError as error:
        bench.report.check(False, f"full disk: {error}")
    finally:
        server.kill()


PARTS: dict[str, Callable[[Bench], None]] = {
    "mutated": mutated_requests,
    "hang-ups": hang_ups,
    "unread": unread,
    "files": broken_files,
    "templates": templates,
    "kill": killed,
    "disk": full_disk,
}


if __name__ == "__main__":
    main()
