"""Does a run fit? The plan of a training run (see `lorakit/plan`) from its settings, and the refusal of one that cannot
fit.

Refused is what needs more than the device has, or than `memory` allows. Less being free at the moment is only said, as
it may change, and a run that is taken up again shall not depend on what else is running.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..bases.limits import Memory, memory_of, resident
from ..bases.load import load_config
from ..config import Choice
from ..errors import TrainError
from ..methods import method_of
from ..model.attach import DEFAULT
from ..plan.estimate import Estimate
from ..plan.machine import overhead
from ..plan.planner import Planner, Setting
from ..plan.shell import PlanError
from ..plan.units import parse_bytes, show_bytes
from ..tasks import task_of
from ..tasks.task import Item, weight_of
from . import defaults
from .config import TrainConfig

UNCHECKED = "unchecked"


def planner_for(
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    share: float = 1.0,
    held: int | None = None,
    validation: int = 0,
    state_copies: int = 2,
) -> Planner:
    """The planner of a run. `share`: weight by size; `held`: bytes that this process holds already;
    `validation`: rows of an evaluation's batch."""
    taken = overhead(device) if held is None else overhead(device, held)
    task = task_of(config.task)
    setting = Setting(
        dtype,
        device,
        task,
        taken,
        partial(method_of(config.method).attach, config=config, name=DEFAULT, task_type=task.peft_type),
        config,
        config.method,
        checkpointing=config.gradient_checkpointing,
        plain_attention=defaults.PLAIN_ATTENTION if device.type == "cpu" else 0,
        state_copies=state_copies,
        validation=validation,
        share=share,
        batch=config.batch_size,
    )
    return Planner(load_config(config.model, config.revision, config.trust_remote_code), setting)


def allowed(config: TrainConfig, device: torch.device) -> Memory | None:
    """What the run may take: as `memory` says, else what the device has; None where that is unknown or not to be
    checked.
    """
    if config.memory == UNCHECKED:
        return None
    found = memory_of(device)
    if config.memory == "auto":
        return found
    given = parse_bytes(config.memory)
    return Memory(given, min(given, found.free) if found else given, "memory, as given")


def check(
    config: TrainConfig, dtype: torch.dtype, device: torch.device, rows: list[Item], held_out: int, processes: int = 1
) -> Choice:
    """What the run needs, and of how much. TrainError if that is more than it may take.

    `rows`: those to train on; `held_out`: how many are judged now and then.
    """
    ordered = sorted(rows, key=lambda item: -item.size)
    at_once = defaults.micro_batch(config, ordered[0].size, device, processes).value
    largest = ordered[:at_once]
    share = min(1.0, weight_of(largest) / sum(item.size for item in largest))
    try:
        planner = planner_for(
            config, dtype, device, share=share, held=resident() or None, validation=min(held_out, config.batch_size)
        )
        accumulating = at_once < math.ceil(config.batch_size / processes)
        estimate = planner.estimate(at_once, ordered[0].size, accumulating)
    except PlanError as error:
        return Choice(None, f"not known: {error}")
    may = allowed(config, device)
    if may is None:
        return Choice(estimate, f"about {show_bytes(estimate.total)}, not checked")
    if estimate.total > may.total:
        raise TrainError(refusal(planner, estimate, may, method_of(config.method).cheaper()))
    now = f"; only {show_bytes(may.free)} are free now" if estimate.total > may.free else ""
    return Choice(estimate, f"about {show_bytes(estimate.total)} of {show_bytes(may.total)} ({may.source}){now}")


def refusal(planner: Planner, estimate: Estimate, may: Memory, cheaper: str | None) -> str:
    """What it would need, what there is, and which changes would make it fit. `cheaper`: another method."""
    most = sorted(((size, part) for part, size in estimate.parts.items()), reverse=True)[:3]
    lines = [
        f"this run needs about {show_bytes(estimate.total)}, and there are {show_bytes(may.total)} ({may.source})",
        f"  for {estimate.rows} x {estimate.length} tokens at once; most of it is "
        + ", ".join(f"{part} ({show_bytes(size)})" for size, part in most),
    ]
    rows = planner.most_rows(estimate.length, may.total)
    length = planner.longest(1, may.total, estimate.length)
    if 0 < rows < estimate.rows:
        lines.append(f"  micro_batch: {rows} fits (the same result, accumulated)")
    elif 0 < length < estimate.length:
        lines.append(f"  max_length: {length} with micro_batch: 1 fits")
    if not planner.setting.checkpointing:
        lines.append("  gradient_checkpointing: true needs less for activations")
    if cheaper:
        lines.append(f"  {cheaper}")
    if not rows and not length:
        lines.append("  no batch fits: take a smaller base or a lower precision")
    lines.append(f"  look at the whole: lorakit plan. To start anyway: memory: {UNCHECKED}")
    return "\n".join(lines)
