"""Time training runs from start to end: `lorakit train` against TRL's `SFTTrainer` with PEFT.

Both fine-tune the embedded model on E2E rows: the same token ids and labels (prompts masked) in the same batches of 16,
with the same AdamW, schedule and clipping, from the same adapter (rank 16 on all linears). Each run has its own
process. A step's time is that between the ends of two steps, with everything the trainer does in between; set-up and
the first two steps are left out. Peak memory is the process's high-water mark, set-up included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from ..bases.device import peak_memory
from .measure import PRECISIONS
from .suite import Row, need

TITLE = (
    "Training the embedded model (5.9 M parameters) on E2E rows, 16 a step: `lorakit train` against TRL's SFTTrainer "
    "with PEFT, same\n"
    "rows, batches, masks, optimizer, schedule and initial adapter, each run in its own process. Times are per "
    "optimizer step and per\n"
    "trained token, without set-up; 'over best TRL' compares with TRL's fastest settings. Losses are compared step by "
    "step with TRL's\n"
    "in fp32."
)
ROWS_A_STEP = 16
UNCOUNTED = 2  # warm-up steps at the start
REFERENCE = "TRL fp32"


@dataclass(frozen=True)
class Side:
    """A trainer and its precisions."""

    tool: str  # "lorakit" or "trl"
    weights: str = "fp32"  # of the base
    adapter: str = "fp32"  # of the factors, for TRL
    autocast: bool = False
    attention: str = "sdpa"  # for TRL; lorakit has its own implementation

    @property
    def precision(self) -> torch.dtype:
        """The precision of the matmuls."""
        return torch.bfloat16 if self.autocast or self.weights == "bf16" else torch.float32


# TRL's default is autocast with fp32 weights; plain attention ("eager") is faster for short rows on a CPU.
SIDES = {
    "lorakit fp32": Side("lorakit"),
    "lorakit bf16": Side("lorakit", "bf16"),
    REFERENCE: Side("trl"),
    "TRL fp32, plain attention": Side("trl", attention="eager"),
    "TRL bf16 autocast": Side("trl", autocast=True),
    "TRL bf16 weights, autocast, plain attention": Side("trl", "bf16", autocast=True, attention="eager"),
    "TRL all bf16": Side("trl", "bf16", "bf16"),
    "TRL all bf16, plain attention": Side("trl", "bf16", "bf16", attention="eager"),
}
QUICK = ("lorakit fp32", "lorakit bf16", REFERENCE, "TRL all bf16, plain attention")


@dataclass(frozen=True)
class Outcome:
    """A run's measurements. `seconds` (wall) and `cpu` (of all threads): one value for each step after the first."""

    seconds: list[float]
    cpu: list[float]
    losses: list[float]
    peak: int  # bytes

    @property
    def step(self) -> float:
        """Mean seconds a step."""
        return fmean(self.seconds[UNCOUNTED - 1 :])

    @property
    def cpu_step(self) -> float:
        """Mean CPU seconds a step."""
        return fmean(self.cpu[UNCOUNTED - 1 :])


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[Row]:
    """Return a row for each trainer and setting. Raises MissingPeer without TRL or PEFT."""
    need("trl", "peft")
    steps, rounds, candidates = (8, 1, QUICK) if quick else (40, 3, tuple(SIDES))
    # The reference always runs: losses are compared with it.
    sides = [side for side in candidates if SIDES[side].precision in precisions or side == REFERENCE]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained_tokens = _prepare(folder, steps)
        outcomes = {side: [_process(folder, SIDES[side], steps)] for side in sides}
        best = min((s for s in sides if SIDES[s].tool == "trl"), key=lambda s: outcomes[s][0].step)
        for _ in range(rounds - 1):  # TRL's slower settings run once
            for side in (*(s for s in sides if SIDES[s].tool == "lorakit"), best):
                outcomes[side].append(_process(folder, SIDES[side], steps))
    tokens_a_step = trained_tokens / steps
    return [_row(side, runs, outcomes, best, tokens_a_step) for side, runs in outcomes.items()]


def _row(side: str, runs: list[Outcome], outcomes: dict[str, list[Outcome]], best: str, tokens: float) -> Row:
    seconds, peak = median(r.step for r in runs), median(r.peak for r in runs)
    differences = [abs(a - b) for a, b in zip(runs[0].losses, outcomes[REFERENCE][0].losses, strict=True)]
    return {
        "trainer": side + (" (best TRL)" if side == best else ""),
        "ms a step": seconds * 1e3,
        "CPU ms a step": median(r.cpu_step for r in runs) * 1e3,
        "µs a trained token": seconds / tokens * 1e6,
        "time over best TRL": seconds / median(r.step for r in outcomes[best]),
        "peak RSS MB": peak / 1e6,
        "RSS over best TRL": peak / median(r.peak for r in outcomes[best]),
        "mean |Δloss|": fmean(differences),
        "largest |Δloss|": max(differences),
        "losses": runs[0].losses,
    }


def plot(rows: list[Row], axes: Any) -> None:
    """Draw the losses step by step."""
    for row in rows:
        name = f"{row['trainer']}: {row['ms a step']:.0f} ms a step"
        axes.plot(
            range(1, len(row["losses"]) + 1), row["losses"], label=name, linestyle="-" if "lorakit" in name else ":"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the batch")
    axes.legend(fontsize="small")


# ------------------------------------------------------------------------------------- the same job for both


def _settings(folder: Path, precision: str, steps: int) -> Any:
    from ..train.config import TrainConfig

    return TrainConfig(
        model="embedded",
        data=str(folder / "rows.jsonl"),
        out=str(folder / f"run-{os.getpid()}"),
        steps=steps,
        batch_size=ROWS_A_STEP,
        validation=0,
        max_length=512,
        precision=precision,
        sample_tokens=0,
        save_every=steps,
    )


def _prepare(folder: Path, steps: int) -> int:
    """Write rows, batches (ids and labels), initial adapter and learning rates. Return the number of trained tokens."""
    from ..bases.load import embedded_folder
    from ..model.capture import capture
    from ..ops import IGNORE_INDEX
    from ..tasks.task import weight_of
    from ..train.optimizer import rate_factor
    from ..train.setup import set_up

    rows = (
        (embedded_folder().parent / "e2e" / "train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[: steps * ROWS_A_STEP]
    )
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = _settings(folder, "fp32", steps)
    job = set_up(config)
    batches = [job.batch(step) for step in range(steps)]
    items: list[Any] = [item for batch in batches for item in batch]
    inputs = []
    for item in items:
        pairs = zip(item.ids, item.trained, strict=True)
        labels = [token if trained else IGNORE_INDEX for token, trained in pairs]
        inputs.append({"input_ids": item.ids, "labels": labels})
    rates = [job.rate.value * rate_factor(config, step, steps) for step in range(steps)]
    (folder / "job.json").write_text(json.dumps({"items": inputs, "rates": rates, "clip": config.clip}))
    capture(job.model).save(folder / "start")
    return sum(weight_of(batch) for batch in batches)


def _process(folder: Path, side: Side, steps: int) -> Outcome:
    """Run a side in a fresh process. Raises RuntimeError if it fails."""
    outcome = folder / "outcome.json"
    task = json.dumps({"folder": str(folder), "side": asdict(side), "steps": steps, "outcome": str(outcome)})
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", __name__, task]
    process = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{side} failed ({process.returncode}):\n{process.stderr[-2000:]}")
    return Outcome(**json.loads(outcome.read_text()))


def _main(text: str) -> None:
    task = json.loads(text)
    side, folder = Side(**task["side"]), Path(task["folder"])
    clock = Clock()
    (_lorakit if side.tool == "lorakit" else _trl)(folder, side, task["steps"], clock)
    wall, cpu = ([b - a for a, b in pairwise(times)] for times in (clock.wall, clock.cpu))
    outcome = Outcome(wall, cpu, clock.losses, peak_memory())
    Path(task["outcome"]).write_text(json.dumps(asdict(outcome)))


class Clock:
    """Records when each step ended, and its loss."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: float) -> None:
        """Record the end of a step."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.losses.append(loss)


# ------------------------------------------------------------------------------------- the two trainers


def _lorakit(folder: Path, side: Side, steps: int, clock: Clock) -> None:
    from ..train.progress import Progress
    from ..train.train import train

    class Timed(Progress):
        def row(self, row: dict[str, Any]) -> None:
            clock.step(row["loss"])

    train(_settings(folder, side.weights, steps), Timed(quiet=True))


def _trl(folder: Path, side: Side, steps: int, clock: Clock) -> None:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ..bases.load import embedded_folder

    job = json.loads((folder / "job.json").read_text())
    dtype = torch.bfloat16 if side.weights == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=dtype, attn_implementation=side.attention)
    model = PeftModel.from_pretrained(
        base, str(folder / "start"), is_trainable=True, autocast_adapter_dtype=side.adapter == "fp32"
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [*job["rates"], 0.0].__getitem__)

    class Timed(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                clock.step(logs["loss"])

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=ROWS_A_STEP,
        train_sampling_strategy="sequential",
        max_grad_norm=job["clip"],
        bf16=side.autocast,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(job["items"]),
        processing_class=AutoTokenizer.from_pretrained(embedded_folder()),
        optimizers=(optimizer, schedule),
        callbacks=[Timed()],
    )
    trainer.train()


if __name__ == "__main__":
    _main(sys.argv[1])
