"""The training loop: for each batch: loss, backward, step; now and then: evaluate, sample, save.

What each of these does lives in a file of its own name. Several runs on one base take their steps together: each turn the
next batch of every run that still goes on is computed in shared micro-batches, each row with its run's adapter, and each run
then takes its own step. A run alone is the case of one.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NotFiniteError
from ..model.activate import activate
from ..model.route import route
from ..tasks.task import Item, weight_of
from .interrupt import Interrupt
from .micro import limit_for, micro_batches
from .run import Result, Run


class Loop:
    """Runs on one base, in step.

    `saved` is called each time that all that go on have a new checkpoint, before older ones go; `ended` with each run at its end.
    """

    def __init__(self, runs: Sequence[Run], saved: Callable[[], None] = lambda: None, ended: Callable[[Run], None] = lambda run: None):
        self.runs, self.saved, self.ended = list(runs), saved, ended
        job = self.runs[0].job
        self.accelerator, self.task, self.base = job.accelerator, job.task, job.base
        self.model = self.accelerator.prepare_model(job.model)  # the same object, or its DistributedDataParallel

    def go(self, interrupt: Interrupt) -> list[Result]:
        """All runs to their ends, or to the end of the step in which a signal came."""
        self.model.train()
        self._finish(self.runs)  # those that had ended when they were taken up
        stopped = None
        while (going := [run for run in self.runs if not run.ended]) and not stopped:
            self._step(going)
            for run in going:
                if run.due_to_evaluate and not run.failed:
                    self._evaluate(run)
            stopped = self._agreed(interrupt)
            if stopped or any(run.due_to_save for run in going):
                self._save(going)
            self._finish(going)
        return [run.result(stopped) for run in self.runs]

    def _step(self, going: list[Run]) -> None:
        """A step of every run: gradients of its batch, normalised by the weights of all its rows; then its update."""
        began = time.perf_counter()
        batches = [run.batch() for run in going]
        losses, norms = self._gradients(going, batches)
        told = torch.stack([losses, norms]).tolist()  # one wait for the device
        broken = self._not_finite(*told)
        if broken:
            for place, what, value in broken:
                error = going[place].not_finite(what, value, batches[place])
                if len(self.runs) == 1:
                    raise error
                going[place].failed = str(error)
            # The others' gradients were computed beside what is not finite: again, without it.
            for run in going:
                run.forget_gradients()
            if rest := [run for run in going if not run.failed]:
                self._step(rest)
            return
        rows = [run.update(*figures, batch) for run, *figures, batch in zip(going, *told, batches, strict=True)]
        spent = (time.perf_counter() - began) / len(going)  # each run's share
        for run, row in zip(going, rows, strict=True):
            run.forget_gradients()
            run.spent += spent
            run.log({"step": run.step, **row, "seconds": round(run.spent, 3)})

    def _evaluate(self, run: Run) -> None:
        """A run whose held-out loss is not finite is at its end; the others go on."""
        try:
            run.evaluate()
        except NotFiniteError as error:
            if len(self.runs) == 1:
                raise
            run.failed = str(error)

    def _gradients(self, going: list[Run], batches: list[list[Item]]) -> tuple[Tensor, Tensor]:
        """Backward of all batches, micro-batch by micro-batch. The runs' losses and their gradients' norms, each [runs]."""
        accelerator, first = self.accelerator, going[0]
        torch.manual_seed((first.config.seed << 32) + first.step * accelerator.num_processes + accelerator.process_index)
        mine = [batch[accelerator.process_index :: accelerator.num_processes] for batch in batches]
        # DistributedDataParallel averages over processes; the sum over all of them is what is divided by the weights.
        weights = [accelerator.num_processes / weight_of(batch) for batch in batches]
        if not any(mine):
            # A last batch may have fewer rows than there are processes. One without a row still has to take part in the
            # exchange of gradients: it computes some row and counts it as nothing.
            mine, weights = [batch[:1] for batch in batches], [0.0] * len(batches)
        parts = micro_batches(mine, limit_for([run.job for run in going]))
        totals = [torch.zeros((), device=accelerator.device) for _ in going]
        for i, part in enumerate(parts):
            batch = {k: v.to(accelerator.device) for k, v in self.task.collate(part.items, self.base).items()}
            weight = torch.tensor([weights[run] for run in part.runs], device=accelerator.device)  # [rows]
            with self._routed([going[run].job.adapter for run in part.runs]), self._syncing(last=i + 1 == len(parts)):
                losses = self.task.losses(self.model, batch) * weight
                accelerator.backward(losses.sum())
            for run, own in zip(dict.fromkeys(part.runs), losses.detach().split(part.counts), strict=True):
                totals[run] += own.sum()
        norms = torch.stack([torch.nn.utils.get_total_norm(run.gradients()) for run in going])
        return accelerator.reduce(torch.stack(totals), "mean"), norms.float()

    def _routed(self, adapters: list[str]) -> contextlib.AbstractContextManager[None]:
        """Each row's own adapter. Rows of one run need no routing, which leaves a block its shorter ways."""
        if len(set(adapters)) > 1:
            return route(self.model, adapters)
        if len(self.runs) > 1:
            activate(self.model, adapters[0])
        return contextlib.nullcontext()

    def _syncing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged between processes with the last micro-batch only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    @staticmethod
    def _not_finite(losses: list[float], norms: list[float]) -> list[tuple[int, str, float]]:
        """(place, what, value) of the runs whose loss is not finite; where all are, of those whose gradient is not."""
        for what, values in (("loss", losses), ("gradient", norms)):
            if found := [(i, what, value) for i, value in enumerate(values) if not math.isfinite(value)]:
                return found
        return []

    def _finish(self, runs: list[Run]) -> None:
        for run in runs:
            if run.ended:
                run.finish()
                self.ended(run)

    def _save(self, going: list[Run]) -> None:
        if self.accelerator.is_main_process:
            for run in going:
                if not run.failed:
                    run.save(together=len(self.runs) > 1)
            self.saved()
            for run in going:
                run.prune()
        self.accelerator.wait_for_everyone()

    def _agreed(self, interrupt: Interrupt) -> str | None:
        """The signal to stop at, the same for every process: they get it at different steps, or only one does."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return interrupt.wanted
        wanted = torch.tensor([float(signal.Signals[interrupt.wanted]) if interrupt.wanted else 0.0], device=accelerator.device)
        most = int(accelerator.gather(wanted).max())
        return signal.Signals(most).name if most else None

    def close(self) -> None:
        for run in self.runs:
            run.close()
