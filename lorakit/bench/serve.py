"""Compare the embedded engine with the base alone, with transformers' `generate`, with PEFT, and with HTTP in between.

64 requests, 32 at once, greedy; prompts of 12 to 64 tokens, answers of 12 to 48 (half of both on models of width 512
and more, a quarter in `--quick`). Every side answers the same requests, and the answers must be the same.

    routed         the engine, the requests taking turns between the adapters, over the engine without adapters
    static         transformers' `generate` on left-padded batches of 32: a batch runs until its longest answer ends
    PEFT           the same with adapters and `adapter_names`
    HTTP           the engine behind the API, streamed to clients in another process, over the engine called directly
    cold           an adapter of about 20 MB that is read on its first request, beside streams that run (`serve_cold`)
    equal          answers of mixed batches against those of each request alone
    memory         after an adapter was loaded and unloaded a hundred times, and with a thousand known (`serve_memory`)

Processor time of this process, medians of runs in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import lorakit as lk

from .measure import in_turn
from .mixed import RANKS
from .serve_cold import cold
from .serve_http import through_http
from .serve_memory import memory
from .serve_sides import Alone, Asked, Side, engine_side, peft_side, static_side
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
    "another stream.\n"
    "Equal to alone: answers that equal those of `generate` with that adapter alone. Memory: of a process in which "
    "adapters come and go."
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
    """Return a row for each model and number of adapters, then those of the other comparisons."""
    need("peft")
    settings = [replace(SETTINGS[0], scale=0.25)] if quick else SETTINGS
    counts, rounds = ((1, 8), 3) if quick else ((1, 8, 32), 5)
    rows = [row for setting in settings for row in throughput(setting, counts, rounds)]

    adapters = adapters_of(settings[0], max(counts))
    equal = answers(settings[0], adapters, counts)
    few = dict(itertools.islice(adapters.items(), 8))
    http = through_http(few, asked(settings[0], len(few)), AT_ONCE, rounds)
    return [*rows, *equal, http, *cold(quick), *memory(quick)]


def throughput(setting: Setting, counts: Sequence[int], rounds: int) -> list[Row]:
    """Return a row for each number of adapters. Raises RuntimeError if two sides answer differently."""
    plain = engine_side(model_of(setting), {})
    adapters = adapters_of(setting, max(counts))
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
            found = {name: side.answers(requests) for name, (side, requests) in sides.items()}
            same(found, "base", "static")
            if peft is not None:
                same(found, "routed", "PEFT")
            calls: dict[str, Callable[[], object]] = {
                name: partial(side.answers, requests) for name, (side, requests) in sides.items()
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
        ids = torch.randint(10, 4000, (64,), generator=generator).tolist()[: length(12, 64)]
        choice = ((f"adapter{n % adapters}", 1.0),) if adapters else ()
        requests.append(Asked(tuple(ids), choice, length(12, 48)))
    return requests


def answers(setting: Setting, adapters: Mapping[str, lk.Adapter], counts: Sequence[int]) -> list[Row]:
    """Return how many answers of a mixed batch equal those of each request alone, at each mix."""
    most = len(adapters)
    mixes = [
        replace(request, choice=((f"adapter{n % most}", 0.7), (f"adapter{(n + 1) % most}", 0.3)))
        for n, request in enumerate(asked(setting, 0))
    ]
    batches = {
        "base": asked(setting, 0),
        **{f"{count} adapters": asked(setting, count) for count in counts if count > 1},
    }
    batches["mixes of two"] = mixes
    alone, routed = Alone(model_of(setting), adapters), engine_side(model_of(setting), adapters)
    rows = []
    try:
        for name, requests in batches.items():
            expected = alone.answers(requests)
            rows.append(equal_row(setting, name, routed.answers(requests), expected))
        routed.reload()
        rows.append(equal_row(setting, f"{name}, reloaded", routed.answers(requests), expected))
    finally:
        routed.close()
    return rows


def equal_row(setting: Setting, name: str, got: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]]) -> Row:
    """Return a row that counts equal answers."""
    equal = sum(one == other for one, other in zip(got, expected, strict=True))
    return {"model": setting.name, "answers": name, "equal to alone": f"{equal} of {len(expected)}"}


def model_of(setting: Setting) -> Any:
    """Return a fresh copy of the model, in float32 on a CPU."""
    if setting.shape is not None:
        return llama(setting.shape, torch.float32).eval()
    from ..bases.device import choose_device
    from ..bases.load import load_model

    return load_model(EMBEDDED, torch.float32, choose_device().value).eval()


def adapters_of(setting: Setting, count: int) -> dict[str, lk.Adapter]:
    """Return adapters of unequal ranks on all seven linears, with random factors that change the answers."""
    model, made = model_of(setting), {}
    for n, rank in zip(range(count), itertools.cycle(RANKS)):
        name = f"adapter{n}"
        lk.attach(model, lk.LoraConfig(rank=rank, targets=PROJECTIONS), name=name)
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if ".lora_" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        made[name] = lk.capture(model, name)
        lk.detach(model, name)
    return made


def same(found: Mapping[str, list[tuple[int, ...]]], one: str, other: str) -> None:
    """Raise RuntimeError if more than a few answers differ: rounding can flip the choice between two equal tokens."""
    differing = sum(a != b for a, b in zip(found[one], found[other], strict=True))
    if differing > REQUESTS // 16:
        raise RuntimeError(
            f"{differing} of {REQUESTS} answers of {one} and {other} differ, so times cannot be compared"
        )
