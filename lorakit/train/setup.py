"""Set up training: read the data, load the base, attach the adapter, and resolve every 'auto' with a reason.

Several configs give several jobs on one base, each with its own data, folder and adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..config import Choice
from ..data.dataset import fingerprint, sizes_of
from ..errors import ConfigError
from ..layers.offload import offload, to_memory_or_files
from ..methods import method_of
from ..methods.method import Method
from ..model.attach import DEFAULT
from ..tasks import task_of
from ..tasks.task import Base, Data, Item, Task
from . import compile, defaults, optimizer
from .config import TrainConfig
from .first_batches import epoch_batches, start_data
from .launch import command, peers
from .memory import check
from .micro import limit_for, micro_batches
from .parallel import Parallel
from .run_folder import RunFolder, locked_folder
from .start import resolved
from .trackers import check_trackers

# The settings that determine the training and held-out items.
DATA_SETTINGS = tuple(
    name
    for name in TrainConfig.model_fields
    if any(name in cls.__dict__.get("rows", ()) for cls in TrainConfig.__mro__)
)

PADDING_STEPS = 1000  # at most; enough to say what packing saves


@dataclass
class Job:
    """All that the loop needs for one run. The jobs of a sweep share `parallel` and `base`."""

    adapter: str  # the adapter's name on the model
    config: TrainConfig
    folder: RunFolder
    parallel: Parallel
    base: Base
    data: Data
    train: list[Item]
    held_out: list[Item]
    steps: int
    rate: Choice
    micro_batch: Choice
    dtype: Choice
    data_hash: str
    memory: Choice | None = None  # the estimate; None in a sweep
    compiled: str | None = None  # what torch.compile compiled, for the start panel
    packed: str | None = None  # what packing saves, for the start panel; None: rows are not packed
    steps_before: int | None = None  # of a resumed run that is longer now: the steps planned before
    _epoch: int = -1  # the epoch of `_order`
    _order: list[list[int]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def task(self) -> Task:
        return task_of(self.config.task)

    @property
    def method(self) -> Method:
        return method_of(self.config.method)

    def rate_factors(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, float]]:
        """Return the parameters' groups and learning rates, as factors of the run's: the task's times the method's."""
        of_method = self.method.rate_factors(self.model, self.config, self.adapter)
        return {
            name: _joined(
                self.task.rate_factor(self.config, name, self.rate.value), of_method.get(parameter, ("", 1.0))
            )
            for name, parameter in parameters.items()
        }

    @property
    def result(self) -> Path:
        """The folder in which the method saves its result: an adapter or a model."""
        return self.folder.path / self.method.result

    def batch(self, step: int) -> list[Item]:
        """Return the items of optimizer step `step` (from 0), which depend on the seed and the step alone."""
        per_epoch = defaults.steps_per_epoch(self.config, self.data.rows)
        epoch, index = divmod(step, per_epoch)
        if self._epoch != epoch:
            self._order, self._epoch = epoch_batches(self.config, self.data, epoch), epoch
        return [self.task.drawn(self.train[i], self.config.seed, epoch) for i in self._order[index]]


def _joined(task: tuple[str, float], method: tuple[str, float]) -> tuple[str, float]:
    return "_".join(filter(None, (task[0], method[0]))), task[1] * method[1]


def set_up(config: TrainConfig, held: ExitStack | None = None) -> Job:
    """Prepare a run up to its first step. Raises LorakitError for bad settings or data, or a base that cannot load.

    `held`: takes the lock of the run's folder, and holds it until it is closed; None: the folder is not locked.
    """
    return set_up_together({DEFAULT: config}, held)[0]


def set_up_together(configs: Mapping[str, TrainConfig], held: ExitStack | None = None) -> list[Job]:
    """Prepare several runs on one base. `configs`: by adapter name; the first one's base and device are used.

    `held`: as for `set_up`.
    """
    configs = {name: resolved(each) for name, each in configs.items()}
    config = next(iter(configs.values()))
    for each in configs.values():
        check_trackers(each)
    if config.threads != "auto":
        torch.set_num_threads(int(config.threads))
    task, method, alone = task_of(config.task), method_of(config.method), list(configs) == [DEFAULT]
    processor = task.processor(config)
    configs = {
        name: cast(TrainConfig, task.resolved(each, processor, RunFolder(each.out).earlier()))
        for name, each in configs.items()
    }
    config = next(iter(configs.values()))
    for each in configs.values():
        RunFolder(each.out).check_free()  # before a task draws pictures there
    data = _data_of(configs, task, processor)
    parallel = Parallel(some_unused=not task.uses_all)
    device = parallel.device
    for each in configs.values():
        optimizer.check(each, device)
    if config.compile:
        compile.check(config, device, parallel.world, len(configs))
    if not alone and (why := next((why for each in configs.values() if (why := method.alone(each))), None)):
        raise ConfigError(why[1])  # known only now: an adapter to start from may have saved modules
    dtype = method.precision(config, device)
    # Check the memory before anything is written or loaded. (That of a sweep is not estimated.)
    memory = None
    if alone:
        memory = check(config, dtype.value, device, data[DEFAULT].train, len(data[DEFAULT].held_out), parallel.world)
    folders = {name: RunFolder(each.out) for name, each in configs.items()}
    hashes = {name: fingerprint(chain(each.train, each.held_out)) for name, each in data.items()}
    if parallel.is_first:
        for name, each in configs.items():
            if held is not None:
                held.enter_context(locked_folder(folders[name].path))
            folders[name].open(each, hashes[name], defaults.total_steps(each, data[name].rows))
    with peers(parallel.world, command(parallel.world, config.out)):
        parallel.wait()
    model = task.load(config, processor, next(iter(data.values())), dtype.value, device)
    bases = {}
    for name, each in configs.items():
        task.check(each, model, chain(data[name].train, data[name].held_out))
        bases[name] = Base(model, task.for_run(processor, each), each)
        torch.manual_seed(each.seed)
        first = start_data(bases[name], data[name], parallel)
        method.attach(model, task.to_attach(each, processor), name, task.peft_type, first)
        method.check_result(model, each, name, partial(task.unsaved, each, bases[name].processor))
    if config.gradient_checkpointing:
        task.checkpoint(model)
    if config.offload_activations:
        offload(model, to_memory_or_files(device, folders[next(iter(configs))].path))
    longest = max(_longest(each.train) for each in data.values())
    task.configure(model, device, longest)
    compiled = None
    if config.compile:
        micro_batch = defaults.micro_batch(config, longest, device, parallel.world).value
        row_counts = compile.row_counts(micro_batch, config.batch_size, data[DEFAULT].rows)
        compiled = compile.compile_layers(model, row_counts, longest, task)
    jobs = []
    for name, each in configs.items():
        train = data[name].train
        steps = defaults.total_steps(each, data[name].rows)
        jobs.append(
            Job(
                name,
                each,
                folders[name],
                parallel,
                bases[name],
                data[name],
                train,
                data[name].held_out,
                steps,
                rate=defaults.learning_rate(each, task.learning_rate(each, model), steps),
                micro_batch=defaults.micro_batch(each, _longest(train), device, parallel.world),
                dtype=dtype,
                data_hash=hashes[name],
                memory=memory,
                compiled=compiled,
            )
        )
    for job in jobs:
        if not alone:
            method.activate(model, job.adapter)
        task.prepare(job.base, chain(job.train, job.held_out))
    if alone and task.packs(config):
        jobs[0].packed = task.saved_padding(_at_once(jobs[0]))
    return jobs


def _at_once(job: Job) -> list[list[Item]]:
    """Return the items that a process computes at once, in the first epoch."""
    steps = min(job.steps, defaults.steps_per_epoch(job.config, job.data.rows), PADDING_STEPS)
    limit = limit_for([job])
    shares = (job.parallel.share(job.batch(step)) for step in range(steps))
    return [part.items for share in shares for part in micro_batches([share], limit)]


def _data_of(configs: Mapping[str, TrainConfig], task: Task, processor: Any) -> dict[str, Data]:
    """Return each run's data, reading data that runs share only once."""
    by_settings: dict[str, Data] = {}
    data = {}
    for name, config in configs.items():
        key = json.dumps([getattr(config, setting) for setting in DATA_SETTINGS])
        if key not in by_settings:
            by_settings[key] = task.data(config, processor)
        data[name] = by_settings[key]
    return data


def _longest(items: list[Item]) -> int:
    return max(sizes_of(items))
