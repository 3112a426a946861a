"""A decode step whose rows use different adapters: against PEFT's `adapter_names`, and with hundreds of adapters that take turns.

32 rows of one token each; 1, 8 or 32 adapters of unequal ranks on all seven linears, four rows on the base, no two neighbouring
rows alike. `route` is entered anew at every step, as a server does.

    against PEFT    all that are attached are used. Both sides have the same weights and factors, and have to agree
    taking turns    400 are attached. The batch names the same ones at every step, or one other, or all others, always of the same
                    ranks, so that only the change makes a difference
    attaching       one more adapter beside 1 or 400, and the first step after that, which does not use it
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .measure import in_turn
from .suite import Row
from .train_step import PROJECTIONS, Shape, llama

TITLE = (
    "A decode step of 32 rows with 1, 8 and 32 adapters of unequal ranks (4 to 64), four rows on the base. 'overhead': the step's time\n"
    "less that of the base alone; 'over PEFT': lorakit's overhead over that of PEFT's adapter_names. With many attached: a step whose\n"
    "adapters are those of the step before, and how much longer it takes if one of them changes each time, or all do; the time to attach\n"
    "one more, and how much longer the first step after that takes."
)
ROWS = 32
RANKS = (16, 4, 64, 8, 32, 8, 16, 48)


STEPS = 4  # at a time; a single one would find its factors driven out of the caches by the other sides


def run(quick: bool = False, precisions: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> list[Row]:
    shapes = [Shape(layers=2)] if quick else [Shape(), Shape(hidden=2048, layers=2, ffn=5632)]
    counts, rounds, attached = ((1, 8), 5, 24) if quick else ((1, 8, 32), 21, 400)
    rows = [row for shape in shapes for dtype in precisions for row in against_peft(shape, dtype, counts, rounds)]
    return rows + [row for dtype in precisions for row in many_attached(shapes[0], dtype, attached, counts, rounds)]


def many_attached(shape: Shape, dtype: torch.dtype, attached: int, counts: Sequence[int], rounds: int) -> list[Row]:
    """Rows for attaching beside 1 and beside `attached`, and for each number of adapters in use."""
    model, names = llama(shape, dtype).eval(), [f"adapter{i}" for i in range(attached)]
    ids = torch.randint(2, shape.vocabulary, (ROWS, 1), device=next(model.parameters()).device)
    rows: list[Row] = []

    def row(**measured: Any) -> None:
        rows.append({"model": f"{shape.hidden} x {shape.layers}", "precision": str(dtype).removeprefix("torch."), **measured})

    def step(mix: Sequence[str]) -> None:
        with lk.route(model, choices_for(mix)):
            model(input_ids=ids, use_cache=False)

    with torch.inference_mode():
        for name, rank in zip(names, itertools.cycle(RANKS)):
            with torch.inference_mode(False):
                attach_one(model, name, rank)
            if name == names[0]:
                row(**attaching(model, 1, lambda: step(names[:1])))
        for turn in range(0, attached, ROWS):
            step(names[turn : turn + ROWS])  # a server has met all of them
        row(**attaching(model, attached, lambda: step(names[: max(counts)])))
        for count in counts:
            sides = {kind: mixes(names, count, kind) for kind in ("steady", "one", "all")}

            spent = step_seconds(sides, step, rounds)
            row(
                adapters=count, attached=attached, **{"step ms": round(1e3 * spent["steady"], 1)},
                **{f"{kind} changing": round(spent[kind] / spent["steady"], 3) for kind in ("one", "all")},
            )  # fmt: skip
    return rows


def step_seconds(sides: dict[str, Iterator[list[str]]], step: Callable[[Sequence[str]], None], rounds: int) -> dict[str, float]:
    """The median of each side's steps. They are timed one by one: a busy machine holds up some of them, and would spoil all STEPS of a turn."""
    spent: dict[str, list[float]] = {kind: [] for kind in sides}
    for _ in range(rounds):
        for kind, mix in sides.items():
            for _ in range(STEPS):
                names = next(mix)
                began = time.perf_counter()
                step(names)
                spent[kind].append(time.perf_counter() - began)
    return {kind: median(found) for kind, found in spent.items()}


def mixes(names: Sequence[str], count: int, kind: str) -> Iterator[list[str]]:
    """What each step names: `count` adapters; of those of the step before none, one or all have given way to others of the same rank."""
    kinds = len(RANKS)
    alike = len(names) // kinds  # adapters of each rank
    at = [k // kinds for k in range(count)]  # which of its rank each is
    for step in itertools.count():
        yield [names[k % kinds + kinds * (place % alike)] for k, place in enumerate(at)]
        for k in range(count) if kind == "all" else [step % count] if kind == "one" else []:
            at[k] += -(-count // kinds)  # past the others of this rank, which differ from each other


def attaching(model: nn.Module, attached: int, step: Callable[[], None], repeats: int = 7) -> Row:
    """Milliseconds to attach one more adapter, and the first step after it over a warm one."""
    attach, first, warm = [], [], []
    for _ in range(repeats):
        step()
        warm.append(seconds(step))
        with torch.inference_mode(False):
            attach.append(seconds(lambda: attach_one(model, "another", 16)))
        first.append(seconds(step))
        with torch.inference_mode(False):
            lk.detach(model, "another")
    return {
        "attached": attached, "step ms": round(1e3 * median(warm), 1), "attach ms": round(1e3 * median(attach), 1),
        "first step": round(median(first) / median(warm), 3),
    }  # fmt: skip


def attach_one(model: nn.Module, name: str, rank: int) -> None:
    lk.attach(model, lk.LoraConfig(rank=rank, targets=PROJECTIONS), name=name, trainable=False)


def seconds(call: Callable[[], object]) -> float:
    """Without garbage collection, which would fall on whoever happens to allocate."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    finally:
        gc.enable()


def against_peft(shape: Shape, dtype: torch.dtype, counts: Sequence[int], rounds: int) -> list[Row]:
    """One row of the table for each number of adapters."""
    names = [f"adapter{i}" for i in range(max(counts))]
    base, ours, theirs = llama(shape, dtype).eval(), lorakit_side(shape, dtype, names), peft_side(shape, dtype, names)
    copy_factors(theirs, ours)
    ids = torch.randint(2, shape.vocabulary, (ROWS, 1), device=next(base.parameters()).device)
    rows = []
    for count in counts:
        choices = choices_for(names[:count])
        asked = [name or "__base__" for name in choices]

        def routed(choices: list[str | None] = choices) -> Tensor:
            with lk.route(ours, choices):
                return ours(input_ids=ids, use_cache=False).logits

        def peft(asked: list[str] = asked) -> Tensor:
            return theirs(input_ids=ids, adapter_names=asked, use_cache=False).logits

        with torch.inference_mode():
            apart = (routed() - peft()).abs().max().item() / peft().abs().max().item()
            seconds = in_turn({"base": lambda: base(input_ids=ids, use_cache=False), "lorakit": routed, "PEFT": peft}, rounds)
        if apart > (0.1 if dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"lorakit and PEFT disagree by {apart:.2g} of the largest logit: this would compare two different things")
        over = {name: 1e3 * (seconds[name] - seconds["base"]) for name in ("lorakit", "PEFT")}
        rows.append(
            {
                "model": f"{shape.hidden} x {shape.layers}", "precision": str(dtype).removeprefix("torch."), "adapters": count,
                "base ms": round(1e3 * seconds["base"], 1), "overhead ms": round(over["lorakit"], 2),
                "PEFT's overhead ms": round(over["PEFT"], 2), "over PEFT": round(over["lorakit"] / over["PEFT"], 2),
            }
        )  # fmt: skip
    return rows


def choices_for(names: Sequence[str]) -> list[str | None]:
    """A choice per row: every eighth row is the base's, the others take the adapters in turn."""
    turn = itertools.cycle(names)
    return [None if row % 8 == 3 else next(turn) for row in range(ROWS)]


def lorakit_side(shape: Shape, dtype: torch.dtype, names: list[str]) -> nn.Module:
    model = llama(shape, dtype)
    for name, rank in zip(names, itertools.cycle(RANKS)):
        attach_one(model, name, rank)
    return model.eval()


def peft_side(shape: Shape, dtype: torch.dtype, names: list[str]) -> nn.Module:
    import peft

    configs = [peft.LoraConfig(r=rank, lora_alpha=32, target_modules=PROJECTIONS) for _, rank in zip(names, itertools.cycle(RANKS))]
    model = peft.get_peft_model(llama(shape, dtype), configs[0], adapter_name=names[0], autocast_adapter_dtype=False)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.eval()


def copy_factors(theirs: nn.Module, ours: nn.Module) -> None:
    """The same random factors on both sides, small enough that the logits stay of the base's size."""
    made = torch.Generator().manual_seed(1)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:  # base_model.model.<module>.lora_A.<adapter>.weight
                module, side, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.02)
                mine[f"{module}.lora_{adapter}.{side[-1]}"].copy_(parameter)
