"""From a config to a job that can run: data rendered, base loaded, adapter attached, every 'auto' resolved with its reason.

Several configs make several jobs on one base, each with its own data, folder and adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..bases.load import load_model, load_tokenizer
from ..config import Choice
from ..data.batches import batch_order
from ..data.dataset import Dataset, Item, build, fingerprint, split
from ..data.read import read_rows
from ..errors import TrainError
from ..generate.generate import positions_of
from ..layers.fused import attention
from ..methods import method_of
from ..methods.method import Method
from ..model.attach import DEFAULT
from . import compile, defaults
from .config import TrainConfig
from .memory import check
from .run_folder import RunFolder
from .trackers import check_trackers

# What decides which rows are trained on and held out, and as which tokens.
DATA_SETTINGS = ("data", "split", "columns", "template", "train_on", "max_length", "on_long", "validation")
# Which rows are held out is the same for every seed: runs that differ in their seeds are compared on the same rows.
SPLIT_SEED = 0


@dataclass
class Job:
    """All that the loop needs for one run. Jobs that train together share accelerator, model and tokenizer."""

    adapter: str  # its name on the model
    config: TrainConfig
    folder: RunFolder
    accelerator: Any
    model: Any
    tokenizer: Any
    data: Dataset
    train: list[Item]
    held_out: list[Item]
    steps: int
    rate: Choice
    micro_batch: Choice
    dtype: Choice
    pad_id: int
    data_hash: str
    memory: Choice | None = None  # the estimate; none for runs that train together
    compiled: str | None = None  # what torch.compile made
    _epoch: int = -1  # whose order is kept
    _order: list[list[int]] = field(default_factory=list)

    @property
    def method(self) -> Method:
        return method_of(self.config.method)

    @property
    def result(self) -> Path:
        """The folder of what comes out: an adapter's, or a model's."""
        return self.folder.path / self.method.result

    def batch(self, step: int) -> list[Item]:
        """The rows of optimizer step `step` (from 0): a function of the seed and the step alone."""
        per_epoch = defaults.steps_per_epoch(self.config, len(self.train))
        epoch, place = divmod(step, per_epoch)
        if self._epoch != epoch:
            lengths = [len(item.ids) for item in self.train]
            self._order = batch_order(lengths, self.config.batch_size, self.config.seed, epoch, self.config.group_by_length)
            self._epoch = epoch
        return [self.train[i] for i in self._order[place]]


def set_up(config: TrainConfig) -> Job:
    """Everything up to the first step. Raises LorakitError for bad settings, data, or a base that does not load."""
    return set_up_together({DEFAULT: config})[0]


def set_up_together(configs: Mapping[str, TrainConfig]) -> list[Job]:
    """The same for several runs on one base, by their adapters' names. Settings of base and device are the first one's."""
    from accelerate import Accelerator

    config = next(iter(configs.values()))
    for each in configs.values():
        check_trackers(each)
    if config.threads != "auto":
        torch.set_num_threads(int(config.threads))
    tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    data = _data_of(configs, tokenizer)
    accelerator = Accelerator(mixed_precision="no")  # the base's precision is `config.precision`; factors are float32
    device = accelerator.device
    if config.compile:
        compile.check(config, device, accelerator.num_processes, len(configs))
    method, alone = method_of(config.method), list(configs) == [DEFAULT]
    dtype = method.precision(config, device)
    # Before anything is written or loaded. (What runs that train together need is not estimated.)
    memory = check(config, dtype.value, device, data[DEFAULT][1], len(data[DEFAULT][2]), accelerator.num_processes) if alone else None
    folders = {name: RunFolder(each.out) for name, each in configs.items()}
    hashes = {name: fingerprint(train + held_out) for name, (_, train, held_out) in data.items()}
    if accelerator.is_main_process:
        for name, each in configs.items():
            folders[name].open(each, hashes[name])
    accelerator.wait_for_everyone()
    model = load_model(config.model, dtype.value, device, config.revision, config.trust_remote_code)
    for name, each in configs.items():
        _, train, held_out = data[name]
        _check_model(model, train + held_out, each)
        torch.manual_seed(each.seed)
        method.attach(model, each, name)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    longest = max(_longest(train) for _, train, _ in data.values())
    if device.type == "cpu" and longest <= defaults.PLAIN_ATTENTION and not attention.is_used(model):
        model.set_attn_implementation("eager")
    compiled = None
    if config.compile:
        most = defaults.micro_batch(config, longest, device, accelerator.num_processes).value
        numbers = compile.rows_at_once(most, config.batch_size, len(data[DEFAULT][1]))
        compiled = compile.compile_layers(model, numbers, longest, len(tokenizer))
    pad = tokenizer.pad_token_id
    jobs = []
    for name, each in configs.items():
        rows, train, held_out = data[name]
        steps = defaults.total_steps(each, len(train))
        jobs.append(Job(
            name, each, folders[name], accelerator, model, tokenizer, rows, train, held_out, steps,
            rate=defaults.learning_rate(each, _width(model), steps),
            micro_batch=defaults.micro_batch(each, _longest(train), device, accelerator.num_processes),
            dtype=dtype, pad_id=tokenizer.eos_token_id if pad is None else pad, data_hash=hashes[name], memory=memory, compiled=compiled,
        ))  # fmt: skip
    return jobs


Rows = tuple[Dataset, list[Item], list[Item]]  # the dataset, and of its items those to train on and those held out


def _data_of(configs: Mapping[str, TrainConfig], tokenizer: Any) -> dict[str, Rows]:
    """Each run's rows. Those that runs share are read once."""
    read: dict[str, Rows] = {}
    found = {}
    for name, config in configs.items():
        key = json.dumps([getattr(config, setting) for setting in DATA_SETTINGS])
        if key not in read:
            read[key] = _data(config, tokenizer)
        found[name] = read[key]
    return found


def _data(config: TrainConfig, tokenizer: Any) -> Rows:
    def read(source: str, name: str | None, most: int | Literal["auto"]) -> Dataset:
        return build(
            read_rows(source, name), tokenizer, columns=config.columns or None, template=config.template, train_on=config.train_on,
            max_length=most, on_long=config.on_long,
        )  # fmt: skip

    data = read(config.data, config.split, config.max_length)
    if isinstance(config.validation, str):
        held = read(config.validation, None, data.max_length)
        if held.dropped:
            note = f"of {config.validation} are longer than {data.max_length} tokens and are not judged"
            data = replace(data, notes={**data.notes, note: held.dropped})
        return data, data.items, held.items
    if config.validation == 0:
        return data, data.items, []
    train, held_out = split(data.items, config.validation, SPLIT_SEED)
    return data, train, held_out


def trained_in(items: list[Item]) -> int:
    """Trained positions of some rows; the first position of a row predicts from nothing and is never trained."""
    return sum(sum(item.trained[1:]) for item in items)


def _check_model(model: Any, items: list[Item], config: TrainConfig) -> None:
    """What would fail at the first batch or, worse, at the first evaluation."""
    if model.config.is_encoder_decoder:
        raise TrainError(f"{config.model} is an encoder-decoder ({type(model).__name__}); the loss here is that of a decoder-only model")
    positions = positions_of(model)
    longest = max(items, key=lambda item: len(item.ids))
    if positions is not None and len(longest.ids) > positions:
        raise TrainError(
            f"{longest.row.where}: {len(longest.ids)} tokens, and {config.model} has {positions} positions\n"
            f"  set max_length to {positions} or less; what becomes of longer rows is set by on_long"
        )


def _width(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "hidden_size", None)


def _longest(items: list[Item]) -> int:
    return max(len(item.ids) for item in items)
