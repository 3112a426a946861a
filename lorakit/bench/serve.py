"""Compare the embedded engine with the base alone, with transformers' `generate`, with PEFT, and with HTTP in between.

64 requests, 32 at once, greedy; prompts of 12 to 64 tokens, answers of 12 to 48 (half of both on models of width 512
and more, a quarter in `--quick`). Every side answers the same requests, and the answers must be the same.

    routed         the engine, the requests taking turns between the adapters, over the engine without adapters
    static         transformers' `generate` on left-padded batches of 32: a batch runs until its longest answer ends
    PEFT           the same with adapters and `adapter_names`
    HTTP           the engine behind the API, streamed to clients in another process, over the engine called directly
    cold           an adapter of about 20 MB that is read on its first request, beside streams that run (`serve_cold`)

Processor time of this process, medians of runs in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import lorakit as lk

from .measure import in_turn
from .mixed import RANKS
from .serve_cold import cold
from .serve_http import through_http
from .serve_sides import Asked, Side, engine_side, peft_side, static_side
from .suite import Row, need
from .train_step import PROJECTIONS, Shape, llama

TITLE = (
    "Serving: 64 greedy requests, 32 at once, answered by the embedded engine. 'over base': its tokens per second of "
    "processor time with\n"
    "1, 8 or 32 adapters in the batch, over a model without adapters. 'over static', 'over PEFT': over transformers' "
    "generate on\n"
    "left-padded batches of 32, without adapters and with PEFT's adapter_names. 'HTTP over direct': streamed through "
    "the API. Cold: the\n"
    "time to the first token of an adapter that has to be read, beyond one that is attached, and the longest wait of "
    "another stream."
)
REQUESTS, AT_ONCE = 64, 32
EMBEDDED = "embedded"


@dataclass(frozen=True)
class Setting:
    """A model and the size of its requests. shape: None is the embedded model."""

    name: str
    shape: Shape | None
    scale: float  # of prompts and answers
    peft: bool = True


SETTINGS = (
    Setting("256 x 6 (embedded)", None, 1.0),
    Setting("512 x 8", Shape(), 0.5),
    Setting("2048 x 2", Shape(hidden=2048, layers=2, ffn=5632), 0.5, peft=False),
)


def run(quick: bool = False) -> list[Row]:
    """Return a row for each model and number of adapters, then those of HTTP and of cold adapters."""
    need("peft")
    settings = [replace(SETTINGS[0], scale=0.25)] if quick else SETTINGS
    counts, rounds = ((1, 8), 3) if quick else ((1, 8, 32), 5)
    rows = [row for setting in settings for row in throughput(setting, counts, rounds)]

    adapters = {f"adapter{i}": values(settings[0], f"adapter{i}", 8) for i in range(8)}
    http = through_http(adapters, asked(settings[0], len(adapters)), AT_ONCE, rounds)
    return [*rows, http, *cold(quick)]


def throughput(setting: Setting, counts: Sequence[int], rounds: int) -> list[Row]:
    """Return a row for each number of adapters. Raises RuntimeError if two sides answer differently."""
    names = [f"adapter{i}" for i in range(max(counts))]
    plain = engine_side(model_of(setting), {})
    adapters = {name: values(setting, name, rank) for name, rank in zip(names, itertools.cycle(RANKS))}
    routed = engine_side(model_of(setting), adapters)
    static = static_side(model_of(setting), AT_ONCE)
    peft = peft_side(model_of(setting), adapters, AT_ONCE) if setting.peft else None
    rows = []
    try:
        for count in counts:
            base, mixed = asked(setting, 0), asked(setting, count)
            sides: dict[str, tuple[Side, Sequence[Asked]]] = {
                "base": (plain, base),
                "routed": (routed, mixed),
                "static": (static, base),
            }
            if peft is not None:
                sides["PEFT"] = (peft, mixed)
            answers = {name: side.answers(requests) for name, (side, requests) in sides.items()}
            same(answers, "base", "static")
            if peft is not None:
                same(answers, "routed", "PEFT")
            calls: dict[str, Callable[[], object]] = {
                name: lambda side=side, requests=requests: side.answers(requests)  # type: ignore[misc]
                for name, (side, requests) in sides.items()
            }
            times = in_turn(calls, rounds, 1, time.process_time)
            tokens = sum(request.new for request in mixed)
            rows.append(
                {
                    "model": setting.name,
                    "adapters": count,
                    "base tokens/s": round(tokens / times["base"]),
                    "over base": round(times["base"] / times["routed"], 2),
                    "over static": round(times["static"] / times["base"], 2),
                    "over PEFT": round(times["PEFT"] / times["routed"], 2) if peft is not None else None,
                }
            )
    finally:
        plain.close()
        routed.close()
    return rows


def asked(setting: Setting, adapters: int) -> list[Asked]:
    """Return the requests: the adapters in turn, none for 0."""
    generator = torch.Generator().manual_seed(7)

    def length(low: int, high: int) -> int:
        drawn = int(torch.randint(low, high + 1, (1,), generator=generator))
        return max(2, round(drawn * setting.scale))

    requests = []
    for n in range(REQUESTS):
        ids = torch.randint(10, 4000, (length(12, 64),), generator=generator).tolist()
        name = f"adapter{n % adapters}" if adapters else None
        requests.append(Asked(tuple(ids), name, length(12, 48)))
    return requests


def model_of(setting: Setting) -> Any:
    """Return a fresh copy of the model, in float32 on a CPU."""
    if setting.shape is not None:
        return llama(setting.shape, torch.float32).eval()
    from ..bases.device import choose_device
    from ..bases.load import load_model

    return load_model(EMBEDDED, torch.float32, choose_device().value).eval()


def values(setting: Setting, name: str, rank: int) -> lk.Adapter:
    """Return an adapter of this rank on all seven linears, with random factors that change the answers."""
    model = lk.attach(model_of(setting), lk.LoraConfig(rank=rank, targets=PROJECTIONS), name=name)
    generator = torch.Generator().manual_seed(int(name.removeprefix("adapter")))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return lk.capture(model, name)


def same(answers: dict[str, list[tuple[int, ...]]], one: str, other: str) -> None:
    """Raise RuntimeError if more than a few answers differ: rounding can flip the choice between two equal tokens."""
    differing = sum(a != b for a, b in zip(answers[one], answers[other], strict=True))
    if differing > REQUESTS // 16:
        raise RuntimeError(
            f"{differing} of {REQUESTS} answers of {one} and {other} differ, so times cannot be compared"
        )
