"""The training loop: for each batch: loss, backward, step; now and then: evaluate, sample, save.

What each of these does lives in a file of its own name. Everything random is a function of (seed, step), so a run that is
killed and taken up again ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch

from ..data.batches import collate
from ..data.dataset import Item
from ..errors import TrainError, listing
from ..evaluate.perplexity import perplexity
from ..model import capture
from . import checkpoint, defaults, samples
from .config import TrainConfig
from .early_stop import EarlyStop
from .interrupt import Interrupt, listening
from .loss import summed_loss
from .progress import Progress
from .report import write_report
from .run_folder import FREE
from .setup import Job, set_up, trained_in
from .trackers import Trackers


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `adapter`: its folder (a model's, for full fine-tuning), or None if it was interrupted."""

    adapter: Path | None
    step: int
    steps: int
    loss: float | None
    best_loss: float | None
    best_step: int | None
    seconds: float
    stopped: str | None  # "early", or the signal's name


def train(config: TrainConfig, progress: Progress | None = None) -> Result:
    """Train one adapter as `config` says; see `Result`. Raises LorakitError, having kept the last good checkpoint."""
    progress = progress or Progress()
    job = set_up(config)
    with contextlib.closing(_Run(job, progress)) as run, listening() as interrupt:
        return run.go(interrupt)


class _Run:
    def __init__(self, job: Job, progress: Progress):
        self.job, self.progress, self.config = job, progress, job.config
        parameters = list(checkpoint.trainable(job.model).values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=job.rate.value, betas=(self.config.beta1, self.config.beta2), weight_decay=self.config.weight_decay, fused=True
        )
        self.early = EarlyStop(self.config.patience)
        self.best: dict[str, torch.Tensor] = {}
        self.step, self.spent = 0, 0.0
        self.last_loss: float | None = None
        self._resume()
        self.model = job.accelerator.prepare_model(job.model)  # the same object, or its DistributedDataParallel
        self.trackers = Trackers(self.config) if job.accelerator.is_main_process else None
        self.prompts = samples.prompts_for(self.config, job.model, job.tokenizer, job.held_out, job.data.style)
        self.base_answers: list[str] = []

    def go(self, interrupt: Interrupt) -> Result:
        job, config = self.job, self.config
        self.progress.start(job, self.step)
        every, saving = defaults.evaluate_every(config, job.steps), defaults.save_every(config, job.steps)
        job.model.train()
        while self.step < job.steps and not self.early.stop:
            began = time.perf_counter()
            row = self._optimizer_step(job.batch(self.step))
            self.step += 1
            self.spent += time.perf_counter() - began
            last = self.step == job.steps
            self._log({"step": self.step, **row, "seconds": round(self.spent, 3)})
            if self.step % every == 0 or last:
                self._evaluate()
                self._sample()
            stopped = self._agreed(interrupt)
            if self.step % saving == 0 or last or self.early.stop or stopped:
                self._save()
            if stopped and not last:
                self.progress.stop()
                return self._result(None, stopped)
        return self._finish()

    def _optimizer_step(self, items: list[Item]) -> dict[str, Any]:
        """Loss and gradients of one batch, in micro-batches, normalised by the trained tokens of all of it; then a step."""
        accelerator, config = self.job.accelerator, self.config
        torch.manual_seed((config.seed << 32) + self.step * accelerator.num_processes + accelerator.process_index)
        tokens = trained_in(items)
        mine = items[accelerator.process_index :: accelerator.num_processes]
        # A last batch may have fewer rows than there are processes. One without a row still has to take part in the exchange
        # of gradients: it computes some row and counts it as nothing.
        weight = accelerator.num_processes / tokens if mine else 0.0
        mine = mine or items[:1]
        parts = [mine[i : i + self.job.micro_batch.value] for i in range(0, len(mine), self.job.micro_batch.value)]
        total = torch.zeros((), device=accelerator.device)
        for i, part in enumerate(parts):
            batch = {k: v.to(accelerator.device) for k, v in collate(part, self.job.pad_id).items()}
            with accelerator.no_sync(self.model) if i + 1 < len(parts) else contextlib.nullcontext():
                # DistributedDataParallel averages over processes; the sum over all of them is what is divided by `tokens`.
                loss = summed_loss(self.model, batch) * weight
                accelerator.backward(loss)
            total += loss.detach()
        loss_value = float(accelerator.reduce(total, "mean"))
        self._check_finite(loss_value, items, "loss")
        rate = self.job.rate.value * defaults.rate_factor(config, self.step, self.job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = self.optimizer.param_groups[0]["params"]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
        self._check_finite(norm, items, "gradient")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last_loss = loss_value
        return {"loss": round(loss_value, 5), "learning_rate": rate, "gradient_norm": round(norm, 5), "tokens": tokens}

    def _check_finite(self, value: float, items: list[Item], what: str) -> None:
        if math.isfinite(value):
            return
        kept = checkpoint.found(self.job.folder.checkpoints)
        saved = (
            f"the last good checkpoint is {self.job.folder.checkpoints}/step-{kept[-1]}" if kept else "no checkpoint had been written yet"
        )
        raise TrainError(
            f"the {what} is {value} at step {self.step + 1}; nothing was updated, and {saved}\n"
            f"  rows of this batch: {listing([item.row.where for item in items], 16)}\n"
            f"  look at them, or try a lower learning rate (now {self.job.rate.value:g}), precision: fp32, or clip: 1"
        )

    def _evaluate(self) -> None:
        if not self.job.held_out:
            return
        measured = perplexity(self.job.model, self.job.held_out, self.job.pad_id, batch_size=self.config.batch_size)
        if self.early.better(measured.loss, self.step):
            self.best = {n: p.detach().cpu().clone() for n, p in checkpoint.trainable(self.job.model).items()}
        perplexed = round(measured.perplexity, 4) if math.isfinite(measured.perplexity) else None  # JSON has no infinity
        self._log({"step": self.step, "held_out_loss": round(measured.loss, 5), "held_out_perplexity": perplexed})

    def _sample(self) -> None:
        if not (self.prompts and self.job.accelerator.is_main_process):
            return
        job, tokens = self.job, self.config.sample_tokens
        self.base_answers = self.base_answers or samples.of_base(job.model, job.tokenizer, self.prompts, tokens)
        tuned = samples.take(job.model, job.tokenizer, self.prompts, tokens)
        samples.write(job.folder, self.step, self.prompts, self.base_answers, tuned)
        self.progress.sample(self.prompts[0].text, self.base_answers[0], tuned[0])

    def _save(self) -> None:
        if self.job.accelerator.is_main_process:
            state = {"early_stop": self.early.state(), "loss": self.last_loss, "seconds": self.spent, "steps": self.job.steps}
            checkpoint.save(self.job.folder.checkpoints, self.step, self.job.model, self.optimizer, self.best, state, self.config.keep)
        self.job.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        loaded = checkpoint.load_newest(self.job.folder.checkpoints)
        if loaded is None:
            if self.job.accelerator.is_main_process:
                self.job.folder.rewind(0)
            return
        checkpoint.restore(loaded, self.job.model, self.optimizer)
        self.best, self.step, self.spent = loaded.best, loaded.state["step"], loaded.state["seconds"]
        self.last_loss = loaded.state["loss"]
        self.early = EarlyStop(self.config.patience, **loaded.state["early_stop"])
        if self.job.accelerator.is_main_process:
            self.job.folder.rewind(self.step)
            checkpoint.prune(self.job.folder.checkpoints, self.config.keep)  # a kill may have come before its turn

    def _finish(self) -> Result:
        """Write the adapter: the parameters of the best held-out loss, or the last ones where nothing was held out."""
        job = self.job
        if self.best:
            checkpoint.put(self.best, checkpoint.trainable(job.model))
        full = self.config.method == "full"
        result = self._result(
            job.folder.model if full else job.folder.adapter, "early" if self.early.stop and self.step < job.steps else None
        )
        if job.accelerator.is_main_process:
            if full:
                job.model.save_pretrained(job.folder.model)
                job.tokenizer.save_pretrained(job.folder.model)
            else:
                adapter = capture(job.model)
                dataclasses.replace(adapter, metadata={**adapter.metadata, **self._metadata()}).save(job.folder.adapter)
            write_report(job.folder, self.config)
        self.progress.stop()
        return result

    def _metadata(self) -> dict[str, Any]:
        """What travels with the adapter: nothing that depends on the clock, so that equal runs write equal files."""
        job = self.job
        return {
            "recipe": {k: v for k, v in self.config.model_dump(exclude_defaults=True).items() if k not in FREE},
            "data": {"name": Path(self.config.data).name, "hash": job.data_hash, "rows": len(job.train), "template": job.data.style},
            "metrics": {"steps": self.step, "loss": self.last_loss, "held_out_loss": self.early.best_loss},
        }

    def _result(self, adapter: Path | None, stopped: str | None) -> Result:
        return Result(adapter, self.step, self.job.steps, self.last_loss, self.early.best_loss, self.early.best_step, self.spent, stopped)

    def _agreed(self, interrupt: Interrupt) -> str | None:
        """The signal to stop at, the same for every process: they get it at different steps, or only one does."""
        accelerator = self.job.accelerator
        if accelerator.num_processes == 1:
            return interrupt.wanted
        wanted = torch.tensor([float(signal.Signals[interrupt.wanted]) if interrupt.wanted else 0.0], device=accelerator.device)
        most = int(accelerator.gather(wanted).max())
        return signal.Signals(most).name if most else None

    def _log(self, row: dict[str, Any]) -> None:
        if self.job.accelerator.is_main_process:
            self.job.folder.log(row)
            if self.trackers is not None:
                self.trackers.log(row)
            self.progress.row(row)

    def close(self) -> None:
        self.progress.stop()
        if self.trackers is not None:
            self.trackers.close()
