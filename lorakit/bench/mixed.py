"""Time a decode step whose rows use different adapters: against PEFT's `adapter_names`, and with hundreds attached.

32 rows of one token each; 1, 8 or 32 adapters of unequal ranks on all seven linears; four rows use the base, and
neighbouring rows use different adapters. `route` is entered at every step, as a server does.

    against PEFT    every attached adapter is used. Both sides have the same weights and factors, and must agree
    many attached   400 are attached. From step to step the batch keeps its adapters, replaces one, or replaces all,
                    always
                    by others of the same rank, so that nothing but the change differs
    attaching       one more adapter beside 1 or 400, and the first step after that, which does not use it
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .measure import in_turn, seconds
from .suite import Row
from .train_step import PROJECTIONS, Shape, llama

TITLE = (
    "A decode step of 32 rows with 1, 8 and 32 adapters of unequal ranks (4 to 64), four rows on the base. 'overhead': "
    "the step's\n"
    "time less the base's; 'over PEFT': lorakit's overhead over that of PEFT's adapter_names. With many attached: a "
    "step with the\n"
    "adapters of the step before, and relative to it one in which one or all of them change; the time to attach one "
    "more, and the\n"
    "first step after that, relative to other steps."
)
ROWS = 32
RANKS = (16, 4, 64, 8, 32, 8, 16, 48)
STEPS = 4  # per turn: a single one would find its factors evicted from the CPU caches by the other sides


def run(quick: bool = False, precisions: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> list[Row]:
    """Return the rows against PEFT, then those with many attached."""
    shapes = [Shape(layers=2)] if quick else [Shape(), Shape(hidden=2048, layers=2, ffn=5632)]
    counts, rounds, attached = ((1, 8), 5, 24) if quick else ((1, 8, 32), 21, 400)
    rows = [row for shape in shapes for dtype in precisions for row in against_peft(shape, dtype, counts, rounds)]
    return rows + [row for dtype in precisions for row in many_attached(shapes[0], dtype, attached, counts, rounds)]


def many_attached(shape: Shape, dtype: torch.dtype, attached: int, counts: Sequence[int], rounds: int) -> list[Row]:
    """Return rows for attaching beside 1 and beside `attached` adapters, and for each number of adapters in use."""
    model, names = llama(shape, dtype).eval(), [f"adapter{i}" for i in range(attached)]
    ids = torch.randint(2, shape.vocabulary, (ROWS, 1), device=next(model.parameters()).device)
    rows: list[Row] = []

    def add_row(**columns: Any) -> None:
        setting = {"model": f"{shape.hidden} x {shape.layers}", "precision": str(dtype).removeprefix("torch.")}
        rows.append(setting | columns)

    def step(mix: Sequence[str]) -> None:
        with lk.route(model, choices_for(mix)):
            model(input_ids=ids, use_cache=False)

    with torch.inference_mode():
        for name, rank in zip(names, itertools.cycle(RANKS)):
            with torch.inference_mode(False):
                attach_one(model, name, rank)
            if name == names[0]:
                add_row(**attaching(model, 1, lambda: step(names[:1])))
        for turn in range(0, attached, ROWS):
            step(names[turn : turn + ROWS])  # every adapter has been used once, as in a server
        add_row(**attaching(model, attached, lambda: step(names[: max(counts)])))
        for count in counts:
            sides = {kind: mixes(names, count, kind) for kind in ("steady", "one", "all")}
            medians = step_seconds(sides, step, rounds)
            add_row(
                adapters=count,
                attached=attached,
                **{"step ms": round(1e3 * medians["steady"], 1)},
                **{f"{kind} changing": round(medians[kind] / medians["steady"], 3) for kind in ("one", "all")},
            )
    return rows


def step_seconds(
    sides: dict[str, Iterator[list[str]]], step: Callable[[Sequence[str]], None], rounds: int
) -> dict[str, float]:
    """Return the median of each side's steps, timed one by one: so an interruption spoils one step, not a turn."""
    times: dict[str, list[float]] = {kind: [] for kind in sides}
    for _ in range(rounds):
        for kind, mix in sides.items():
            for _ in range(STEPS):
                names = next(mix)
                began = time.perf_counter()
                step(names)
                times[kind].append(time.perf_counter() - began)
    return {kind: median(seconds) for kind, seconds in times.items()}


def mixes(names: Sequence[str], count: int, kind: str) -> Iterator[list[str]]:
    """Yield each step's adapters. kind: none ("steady"), "one" or "all" are replaced by others of the same rank."""
    ranks = len(RANKS)
    per_rank = len(names) // ranks
    index = [k // ranks for k in range(count)]  # of each adapter among those of its rank
    for step in itertools.count():
        yield [names[k % ranks + ranks * (i % per_rank)] for k, i in enumerate(index)]
        for k in range(count) if kind == "all" else [step % count] if kind == "one" else []:
            index[k] += -(-count // ranks)  # skip the others of this rank in the batch


def attaching(model: nn.Module, attached: int, step: Callable[[], None], repeats: int = 7) -> Row:
    """Measure the milliseconds to attach one more adapter, and the first step after that relative to a warm one."""
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
        "attached": attached,
        "step ms": round(1e3 * median(warm), 1),
        "attach ms": round(1e3 * median(attach), 1),
        "first step": round(median(first) / median(warm), 3),
    }


def attach_one(model: nn.Module, name: str, rank: int) -> None:
    """Attach a fresh, frozen adapter to all seven linears."""
    lk.attach(model, lk.LoraConfig(rank=rank, targets=PROJECTIONS), name=name, trainable=False)


def against_peft(shape: Shape, dtype: torch.dtype, counts: Sequence[int], rounds: int) -> list[Row]:
    """Return a row for each number of adapters. Raises RuntimeError if the two sides' logits differ."""
    names = [f"adapter{i}" for i in range(max(counts))]
    base, ours, theirs = llama(shape, dtype).eval(), lorakit_side(shape, dtype, names), peft_side(shape, dtype, names)
    copy_factors(theirs, ours)
    ids = torch.randint(2, shape.vocabulary, (ROWS, 1), device=next(base.parameters()).device)
    rows = []
    for count in counts:
        choices = choices_for(names[:count])
        peft_names = [name or "__base__" for name in choices]

        def routed(choices: list[str | None] = choices) -> Tensor:
            with lk.route(ours, choices):
                return ours(input_ids=ids, use_cache=False).logits

        def peft(names: list[str] = peft_names) -> Tensor:
            return theirs(input_ids=ids, adapter_names=names, use_cache=False).logits

        with torch.inference_mode():
            difference = (routed() - peft()).abs().max().item() / peft().abs().max().item()
            times = in_turn(
                {"base": lambda: base(input_ids=ids, use_cache=False), "lorakit": routed, "PEFT": peft}, rounds
            )
        if difference > (0.1 if dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(
                f"lorakit and PEFT differ by {difference:.2g} of the largest logit, so their times cannot be compared"
            )
        overhead = {name: 1e3 * (times[name] - times["base"]) for name in ("lorakit", "PEFT")}
        rows.append(
            {
                "model": f"{shape.hidden} x {shape.layers}",
                "precision": str(dtype).removeprefix("torch."),
                "adapters": count,
                "base ms": round(1e3 * times["base"], 1),
                "overhead ms": round(overhead["lorakit"], 2),
                "PEFT's overhead ms": round(overhead["PEFT"], 2),
                "over PEFT": round(overhead["lorakit"] / overhead["PEFT"], 2),
            }
        )
    return rows


def choices_for(names: Sequence[str]) -> list[str | None]:
    """Return each row's adapter: None, the base, for every eighth row; the others cycle through `names`."""
    cycle = itertools.cycle(names)
    return [None if row % 8 == 3 else next(cycle) for row in range(ROWS)]


def lorakit_side(shape: Shape, dtype: torch.dtype, names: list[str]) -> nn.Module:
    """Return a Llama with these adapters attached by lorakit."""
    model = llama(shape, dtype)
    for name, rank in zip(names, itertools.cycle(RANKS)):
        attach_one(model, name, rank)
    return model.eval()


def peft_side(shape: Shape, dtype: torch.dtype, names: list[str]) -> nn.Module:
    """Return a Llama with these adapters attached by PEFT."""
    import peft

    ranks = itertools.islice(itertools.cycle(RANKS), len(names))
    configs = [peft.LoraConfig(r=rank, lora_alpha=32, target_modules=PROJECTIONS) for rank in ranks]
    model = peft.get_peft_model(llama(shape, dtype), configs[0], adapter_name=names[0], autocast_adapter_dtype=False)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.eval()


def copy_factors(theirs: nn.Module, ours: nn.Module) -> None:
    """Give both sides the same random factors, small enough that the logits stay near the base's in size."""
    generator = torch.Generator().manual_seed(1)
    our_parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:  # base_model.model.<module>.lora_A.<adapter>.weight
                module, side, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                our_parameters[f"{module}.lora_{adapter}.{side[-1]}"].copy_(parameter)
