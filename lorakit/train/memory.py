"""Estimate a training run's memory from its settings (see `lorakit/plan`), and refuse a run that cannot fit.

A run is refused if it needs more than the device has, or than `memory` allows. If only less is free right now, the
start panel says so: that may change, and whether a run resumes must not depend on other programs.
"""

from __future__ import annotations

import heapq
import math
from functools import partial
from typing import Any, Literal

import torch

from ..bases.limits import Memory, memory_of, resident
from ..bases.stored_weights import storage, storage_of
from ..config import Choice, Quantization, part
from ..data.dataset import sizes_of
from ..errors import TrainError
from ..methods import method_of
from ..model.attach import DEFAULT
from ..plan.estimate import Estimate
from ..plan.machine import overhead
from ..plan.packed import Packing
from ..plan.planner import Planner, PlanSettings
from ..plan.shell import PlanError
from ..plan.static import static_estimate
from ..plan.units import parse_bytes, show_bytes
from ..tasks import task_of
from ..tasks.task import Item, weight_of
from ..tasks.text.base import plain_attention
from . import defaults
from .config import TrainConfig

UNCHECKED = "unchecked"
SMALLEST: Literal["nf4"] = "nf4"  # the way to quantize that is suggested


def planner_for(
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    share: float = 1.0,
    held: int | None = None,
    validation: int = 0,
) -> Planner:
    """Build the planner for a run's settings.

    `share`: trained tokens / tokens; `held`: bytes this process holds already, None to assume a new process;
    `validation`: held-out rows, 0 for no evaluation. Raises PlanError for a base that cannot be
    estimated.
    """
    process_bytes = overhead(device) if held is None else overhead(device, held)
    task = task_of(config.task)
    base = task.blueprint(config)
    if base is None:
        raise PlanError(f"the memory of task {config.task} is not estimated")
    settings = PlanSettings(
        dtype,
        device,
        task,
        process_bytes,
        partial(method_of(config.method).attach, config=config, name=DEFAULT, task_type=task.peft_type),
        config,
        config.method,
        packing_of(config, base),
        checkpointing=config.gradient_checkpointing,
        offload=config.offload_activations,
        plain_attention=plain_attention(device),
        validation=validation,
        share=share,
        batch=config.batch_size,
    )
    return Planner(base, settings)


def packing_of(config: TrainConfig, base: Any, how: Quantization | None = None) -> Packing | None:
    """Return how a run's base stores its linears: quantized while loading or before; None for one that is not.

    `base`: its transformers config; `how`: quantize it so, instead of as the run's settings say.
    """
    stored = storage(how or part(config, Quantization)) or storage_of(base)
    return None if stored is None else Packing(stored, tuple(getattr(config, "save_modules", ())))


def allowed(config: TrainConfig, device: torch.device) -> Memory | None:
    """Return the memory the run may use: the setting `memory`, or what the device has; None if unknown or unchecked."""
    if config.memory == UNCHECKED:
        return None
    available = memory_of(device)
    if config.memory == "auto":
        return available
    limit = parse_bytes(config.memory)
    return Memory(limit, min(limit, available.free) if available else limit, "the setting 'memory'")


def check(
    config: TrainConfig, dtype: torch.dtype, device: torch.device, rows: list[Item], held_out: int, processes: int = 1
) -> Choice:
    """Estimate the run's memory. Returns the `Estimate` (None if it cannot be made) and a line for the start panel.

    `rows`: the training rows; `held_out`: the number of held-out rows. Raises TrainError if the run needs more than it
    may use.
    """
    if not task_of(config.task).traced:
        return _check_static(config, dtype, device)
    longest = max(sizes_of(rows))
    at_once = defaults.micro_batch(config, longest, device, processes).value
    largest = heapq.nlargest(at_once, rows, key=lambda item: item.size)
    share = min(1.0, weight_of(largest) / sum(item.size for item in largest))
    try:
        planner = planner_for(config, dtype, device, share=share, held=resident() or None, validation=held_out)
        accumulating = at_once < math.ceil(config.batch_size / processes)
        estimate = planner.estimate(at_once, longest, accumulating)
    except PlanError as error:
        return Choice(None, f"unknown: {error}")
    limit = allowed(config, device)
    if limit is None:
        return Choice(estimate, f"about {show_bytes(estimate.total)}, not checked")
    if estimate.total > limit.total:
        raise TrainError(refusal(planner, estimate, limit, method_of(config.method).cheaper()))
    now = f"; only {show_bytes(limit.free)} are free now" if estimate.total > limit.free else ""
    return Choice(estimate, f"about {show_bytes(estimate.total)} of {show_bytes(limit.total)} ({limit.source}){now}")


def _check_static(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Choice:
    """Check what a run holds throughout, for a base whose activations cannot be estimated."""
    try:
        estimate = static_estimate(config, dtype, DEFAULT, overhead(device, resident() or 0))
    except PlanError as error:
        return Choice(None, f"unknown: {error}")
    limit, needed = allowed(config, device), show_bytes(estimate.total)
    if limit is not None and estimate.total > limit.total:
        raise TrainError(
            f"this run needs about {needed} of memory before its first step, more than {show_bytes(limit.total)} "
            f"({limit.source})\n  use a lower precision, fewer components or a smaller base\n"
            f"  to start anyway: memory: {UNCHECKED}"
        )
    of = "" if limit is None else f" of {show_bytes(limit.total)} ({limit.source})"
    return Choice(None, f"about {needed}{of}, and the activations, which are not estimated for pictures")


def quantized_estimate(planner: Planner, estimate: Estimate) -> Estimate | None:
    """Estimate the same run on a base that is quantized to 4 bits; None where it is quantized, or cannot be."""
    config: Any = planner.settings.config
    if planner.settings.packing is not None or not method_of(config.method).keeps_base:
        return None
    packing = packing_of(config, planner.base, Quantization(quantize=SMALLEST))
    assert packing is not None
    smaller = planner.stored(packing)
    return smaller.estimate(estimate.rows, estimate.length) if smaller.shell.packed else None


def refusal(planner: Planner, estimate: Estimate, limit: Memory, cheaper: str | None) -> str:
    """Write the error message: memory needed and available, and changes that would make the run fit.

    `cheaper`: the method's suggestion, if any.
    """
    largest = sorted(((size, part) for part, size in estimate.parts.items()), reverse=True)[:3]
    lines = [
        f"this run needs about {show_bytes(estimate.total)} of memory, more than {show_bytes(limit.total)} "
        f"({limit.source})",
        f"  for {estimate.rows} x {estimate.length} tokens at once; the largest parts: "
        + ", ".join(f"{part} ({show_bytes(size)})" for size, part in largest),
    ]
    rows = planner.most_rows(estimate.length, limit.total)
    length = planner.longest(1, limit.total, estimate.length)
    if 0 < rows < estimate.rows:
        lines.append(f"  micro_batch: {rows} fits (the same result, accumulated)")
    elif 0 < length < estimate.length:
        lines.append(f"  max_length: {length} with micro_batch: 1 fits")
    if not planner.settings.checkpointing:
        lines.append("  gradient_checkpointing: true needs less memory for activations")
    elif not planner.settings.offload:
        lines.append("  offload_activations: true keeps what gradient_checkpointing saves outside this memory")
    if cheaper:
        lines.append(f"  {cheaper}")
    if (smaller := quantized_estimate(planner, estimate)) is not None and smaller.total <= limit.total:
        lines.append(f"  quantize: {SMALLEST} fits, and needs about {show_bytes(smaller.total)}")
    if not rows and not length:
        lines.append("  no batch fits: use a smaller base or a lower precision")
    lines.append(f"  for a detailed plan: lorakit plan. To start anyway: memory: {UNCHECKED}")
    return "\n".join(lines)
