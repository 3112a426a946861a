"""The training loop. For each batch: loss, backward, step; now and then: evaluate, sample, save.

Each of these has a file of its own name. Several runs on one base train in lockstep: in each iteration, the next
batches of all active runs are computed in shared micro-batches, each row with its run's adapter, and then each run
takes its own optimizer step. A single run is the same with one.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import NotFiniteError, TrainError
from ..model.route import route
from ..tasks.task import Item, Task, weight_of
from .interrupt import Interrupt
from .labelled import Labelled
from .launch import command, peers
from .logged import Logged
from .micro import limit_for, micro_batches
from .run import Result, Run


class Losses(nn.Module):
    """A task's losses as the forward of one module: batch -> [rows].

    Several processes exchange gradients at the end of a backward through one call of the module that they share. A
    task may call its model several times for a batch, or call it in several ways, so that module is not the model.
    """

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

        self.logged: Mapping[str, Tensor] = {}  # of the last batch: further figures, name -> [rows]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        losses = self.task.losses(self.model, batch)
        self.logged = cast(Any, batch).get("logged", {})  # kept here, as processes may get a copy of the batch
        return losses


class Loop:
    """Trains runs on one base in lockstep.

    `saved` is called whenever all active runs have written a checkpoint, before older ones are deleted; `ended` with
    each run that has ended.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        saved: Callable[[], None] = lambda: None,
        ended: Callable[[Run], None] = lambda run: None,
    ):
        self.runs, self.saved, self.ended = list(runs), saved, ended
        job = self.runs[0].job
        self.parallel, self.method, self.task = job.parallel, job.method, job.task
        self.model = job.model
        self.rows = Losses(job.task, job.model)
        self.losses = self.parallel.wrap(self.rows)

    def go(self, interrupt: Interrupt) -> list[Result]:
        """Train all runs to their end, or until a signal arrives; that step is finished and saved first.

        Raises TrainError or NotFiniteError if a single run's loss is not finite, or it has diverged; in a sweep, only
        that run fails. Raises TrainError if another process of the run is gone.
        """
        world, config = self.parallel.world, self.runs[0].config
        with peers(world, command(world, config.out) if len(self.runs) == 1 else "the same command again"):
            return self._go(interrupt)

    def _go(self, interrupt: Interrupt) -> list[Result]:
        """The same, with torch's own error for a lost process."""
        self.model.train()
        for run in self.runs:
            if not run.ended:
                run.begin()
        self._finish(self.runs)  # resumed runs may have ended already
        stopped = None
        while (active_runs := [run for run in self.runs if not run.ended]) and not stopped:
            self._step(active_runs)
            for run in active_runs:
                if run.due_to_evaluate and not run.failed:
                    self._evaluate(run)
            stopped = self._agreed(interrupt)
            if stopped or any(run.due_to_save for run in active_runs):
                self._save(active_runs)
            self._finish(active_runs)
        return [run.result(stopped) for run in self.runs]

    def _step(self, active_runs: list[Run]) -> None:
        """Take a step in every run: gradients of its batch, normalized by the batch's total weight, then the update."""
        began = time.perf_counter()
        batches = [self._batch(run) for run in active_runs]
        losses, norms, apart = self._gradients(active_runs, batches)
        losses_and_norms = torch.stack([losses, norms]).tolist()  # one synchronization with the device
        not_finite = {
            i: active_runs[i].not_finite(quantity, value, batches[i])
            for i, quantity, value in self._not_finite(*losses_and_norms)
        }
        dead = {i: run.dead(*figures) for i, (run, *figures) in enumerate(zip(active_runs, *losses_and_norms))}
        errors = not_finite or {i: error for i, error in dead.items() if error is not None}
        if errors:
            for i, error in errors.items():
                if len(self.runs) == 1:
                    raise error
                active_runs[i].failed = str(error)
            # The other runs' gradients come from the same passes: compute them again without the failed runs.
            for run in active_runs:
                run.zero_grad()
            if rest := [run for run in active_runs if not run.failed]:
                self._step(rest)
            return
        rows = [
            run.update(*figures, batch, labelled)
            for run, *figures, batch, labelled in zip(active_runs, *losses_and_norms, batches, apart, strict=True)
        ]
        elapsed = (time.perf_counter() - began) / len(active_runs)  # each run's share
        for run, row in zip(active_runs, rows, strict=True):
            run.zero_grad()
            run.elapsed += elapsed
            run.log({"step": run.step, **row, "seconds": round(run.elapsed, 3)})

    def _batch(self, run: Run) -> list[Item]:
        """Return the rows of a run's next step, after its task has looked at them together."""
        batch, before_step = run.batch(), run.job.data.before_step
        if before_step is not None:
            if len(self.runs) > 1:
                self.method.activate(self.model, run.job.adapter)
            before_step(run.job.base, batch)
        return batch

    def _evaluate(self, run: Run) -> None:
        """Evaluate a run. If its held-out loss is not finite or it has diverged, it fails; a single run raises that."""
        try:
            run.evaluate()
        except (NotFiniteError, TrainError) as error:
            if len(self.runs) == 1:
                raise
            run.failed = str(error)

    def _gradients(
        self, active_runs: list[Run], batches: list[list[Item]]
    ) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
        """Run forward and backward by micro-batches. Returns the runs' losses and gradient norms, [runs] each, and
        further figures to log, by name.
        """
        parallel, first = self.parallel, active_runs[0]
        seeded: set[int] = set()
        for run in active_runs:
            run.penalty = self._penalty(run)
        self._seed(first)
        mine = [parallel.share(batch) for batch in batches]
        # Gradients are averaged over processes, but the sum over all of them is to be divided by the batch's weight.
        weights = [parallel.world / weight_of(batch) for batch in batches]
        if not any(mine):
            # An epoch's last batch may have fewer rows than there are processes. A process without rows must still take
            # part in the gradient all-reduce, so it computes one row with weight 0.
            mine, weights = [batch[:1] for batch in batches], [0.0] * len(batches)
        parts = micro_batches(mine, limit_for([run.job for run in active_runs]))
        totals = [torch.zeros((), device=parallel.device) for _ in active_runs]
        apart = [Labelled(self.task, batch, parallel) for batch in batches]
        logged = [Logged(parallel) for _ in batches]
        for i, part in enumerate(parts):
            run = active_runs[part.runs[0]]
            if len(set(part.runs)) == 1 and part.runs[0] not in seeded:  # the random numbers of the run alone
                self._seed(run)
                seeded.add(part.runs[0])
            base = run.job.base
            collated = self.task.collate(part.items, base, packed=first.job.packed is not None)
            batch = {k: v.to(parallel.device) if isinstance(v, Tensor) else v for k, v in collated.items()}
            weight = torch.tensor([weights[run] for run in part.runs], device=parallel.device)  # [rows]
            with (
                self._routed([active_runs[run].job.adapter for run in part.runs]),
                parallel.exchanging(self.losses, last=i + 1 == len(parts)),
            ):
                losses = self.losses(batch) * weight
                parallel.backward(losses.sum())
            factors = batch.get("weight")
            each_factors = [None] * len(part.counts) if factors is None else factors.split(part.counts)
            each_losses = losses.detach().split(part.counts)
            of_runs = zip(dict.fromkeys(part.runs), each_losses, each_factors, part.rows_by_run(), strict=True)
            for number, own, own_factors, rows in of_runs:
                totals[number] += own.sum()
                apart[number].add(rows, own, weights[number], own_factors)
            for name, values in self.rows.logged.items():
                for number, own in zip(dict.fromkeys(part.runs), values.split(part.counts), strict=True):
                    logged[number].add(name, own, counts=weights[number] > 0)
        norms = torch.stack([torch.nn.utils.get_total_norm(run.gradients()) for run in active_runs])
        figures = [of_labels.means() | others.means() for of_labels, others in zip(apart, logged, strict=True)]
        return parallel.mean(torch.stack(totals)), norms.float(), figures

    def _penalty(self, run: Run) -> Tensor | None:
        """Add the gradient of what the run's method adds to its loss, and return that. Every process adds the same, so
        that the mean over processes is the same too.
        """
        penalty = self.method.penalty(self.model, run.job.adapter)
        if penalty is None:
            return None
        with self.parallel.exchanging(self.losses, last=False):
            self.parallel.backward(penalty)
        return penalty.detach()

    def _seed(self, run: Run) -> None:
        """Seed torch's default generators by the run's seed and step, and this process."""
        torch.manual_seed((run.config.seed << 32) + run.step * self.parallel.world + self.parallel.rank)

    def _routed(self, adapters: list[str]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which each row uses its run's adapter. A single run is faster without routing."""
        if len(set(adapters)) > 1:
            return route(self.model, adapters)
        if len(self.runs) > 1:
            self.method.activate(self.model, adapters[0])
        return contextlib.nullcontext()

    @staticmethod
    def _not_finite(losses: list[float], norms: list[float]) -> list[tuple[int, str, float]]:
        """Return (index, "loss", value) of the runs whose loss is not finite; if all are, those of the gradients."""
        for quantity, values in (("loss", losses), ("gradient", norms)):
            if failed := [(i, quantity, value) for i, value in enumerate(values) if not math.isfinite(value)]:
                return failed
        return []

    def _finish(self, runs: list[Run]) -> None:
        for run in runs:
            if run.ended:
                run.finish()
                self.ended(run)

    def _save(self, active_runs: list[Run]) -> None:
        if self.parallel.is_first:
            for run in active_runs:
                if not run.failed:
                    run.save(together=len(self.runs) > 1)
            self.saved()
            for run in active_runs:
                run.prune()
        self.parallel.wait()

    def _agreed(self, interrupt: Interrupt) -> str | None:
        """Agree on a signal to stop at: processes may receive it at different steps, or only one of them does."""
        number = self.parallel.agree(int(signal.Signals[interrupt.signal]) if interrupt.signal else 0)
        return signal.Signals(number).name if number else None

    def close(self) -> None:
        """Close all runs' trackers."""
        for run in self.runs:
            run.close()
