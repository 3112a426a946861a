"""The training loop: for each batch: loss, backward, step; now and then: evaluate, sample, save.

What each of these does lives in a file of its own name. Several runs on one base take their steps together: each turn
the next batch of every run that still goes on is computed in shared micro-batches, each row with its run's adapter, and
each run then takes its own step. A run alone is the case of one.
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
from ..model.route import route
from ..tasks.task import Item, weight_of
from .interrupt import Interrupt
from .micro import limit_for, micro_batches
from .run import Result, Run


class Loop:
    """Runs on one base, in step.

    `saved` is called each time that all that go on have a new checkpoint, before older ones go; `ended` with each run
    at its end.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        saved: Callable[[], None] = lambda: None,
        ended: Callable[[Run], None] = lambda run: None,
    ):
        self.runs, self.saved, self.ended = list(runs), saved, ended
        job = self.runs[0].job
        self.parallel, self.method, self.task, self.base = job.parallel, job.method, job.task, job.base
        self.model = self.parallel.wrap(job.model)

    def go(self, interrupt: Interrupt) -> list[Result]:
        """All runs to their ends, or to the end of the step in which a signal came."""
        self.model.train()
        self._finish(self.runs)  # those that had ended when they were taken up
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
        """A step of every run: gradients of its batch, normalised by the weights of all its rows; then its update."""
        began = time.perf_counter()
        batches = [run.batch() for run in active_runs]
        losses, norms = self._gradients(active_runs, batches)
        losses_and_norms = torch.stack([losses, norms]).tolist()  # one wait for the device
        broken = self._not_finite(*losses_and_norms)
        if broken:
            for place, what, value in broken:
                error = active_runs[place].not_finite(what, value, batches[place])
                if len(self.runs) == 1:
                    raise error
                active_runs[place].failed = str(error)
            # The others' gradients were computed beside what is not finite: again, without it.
            for run in active_runs:
                run.zero_grad()
            if rest := [run for run in active_runs if not run.failed]:
                self._step(rest)
            return
        rows = [
            run.update(*figures, batch)
            for run, *figures, batch in zip(active_runs, *losses_and_norms, batches, strict=True)
        ]
        elapsed = (time.perf_counter() - began) / len(active_runs)  # each run's share
        for run, row in zip(active_runs, rows, strict=True):
            run.zero_grad()
            run.elapsed += elapsed
            run.log({"step": run.step, **row, "seconds": round(run.elapsed, 3)})

    def _evaluate(self, run: Run) -> None:
        """A run whose held-out loss is not finite is at its end; the others go on."""
        try:
            run.evaluate()
        except NotFiniteError as error:
            if len(self.runs) == 1:
                raise
            run.failed = str(error)

    def _gradients(self, active_runs: list[Run], batches: list[list[Item]]) -> tuple[Tensor, Tensor]:
        """Backward of all batches, micro-batch by micro-batch. The runs' losses and their gradients' norms, each
        [runs].
        """
        parallel, first = self.parallel, active_runs[0]
        torch.manual_seed((first.config.seed << 32) + first.step * parallel.world + parallel.rank)
        mine = [parallel.share(batch) for batch in batches]
        # Gradients are averaged over processes; the sum over all of them is what is divided by the weights.
        weights = [parallel.world / weight_of(batch) for batch in batches]
        if not any(mine):
            # A last batch may have fewer rows than there are processes. One without a row still has to take part in the
            # exchange of gradients: it computes some row and counts it as nothing.
            mine, weights = [batch[:1] for batch in batches], [0.0] * len(batches)
        parts = micro_batches(mine, limit_for([run.job for run in active_runs]))
        totals = [torch.zeros((), device=parallel.device) for _ in active_runs]
        for i, part in enumerate(parts):
            batch = {k: v.to(parallel.device) for k, v in self.task.collate(part.items, self.base).items()}
            weight = torch.tensor([weights[run] for run in part.runs], device=parallel.device)  # [rows]
            with (
                self._routed([active_runs[run].job.adapter for run in part.runs]),
                parallel.exchanging(self.model, last=i + 1 == len(parts)),
            ):
                losses = self.task.losses(self.model, batch) * weight
                parallel.backward(losses.sum())
            for run, own in zip(dict.fromkeys(part.runs), losses.detach().split(part.counts), strict=True):
                totals[run] += own.sum()
        norms = torch.stack([torch.nn.utils.get_total_norm(run.gradients()) for run in active_runs])
        return parallel.mean(torch.stack(totals)), norms.float()

    def _routed(self, adapters: list[str]) -> contextlib.AbstractContextManager[None]:
        """Each row's own adapter. Rows of one run need no routing, which leaves a block its shorter ways."""
        if len(set(adapters)) > 1:
            return route(self.model, adapters)
        if len(self.runs) > 1:
            self.method.activate(self.model, adapters[0])
        return contextlib.nullcontext()

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
        """The signal to stop at, the same for every process: they get it at different steps, or only one does."""
        number = self.parallel.agree(int(signal.Signals[interrupt.signal]) if interrupt.signal else 0)
        return signal.Signals(number).name if number else None

    def close(self) -> None:
        for run in self.runs:
            run.close()
