"""Checkpoints of a `Trainer` that hold the adapter instead of the model.

    checkpoint-N/adapter_config.json, adapter_model.safetensors, lorakit.json    the adapter (see `adapter_state`)
                 tokenizer files, training_args.bin, optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json

The trainer gets a class with `AdapterCheckpoints` in front of its own, whose methods write and read the adapter instead
of the model's weights. All others are its own: when to save, what to delete, the best checkpoint, uploads. With LoRA+,
its optimizer gets the second learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import StateError
from ..model.state import qualified_name, state_of
from ..model.training import faster_parameters
from . import adapter_state
from .trained_adapter import check_trainer, model_of, trained_adapter

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin in front of a trainer's own class

T = TypeVar("T")
TRAINING_ARGS = "training_args.bin"


class AdapterCheckpoints(_Trainer):
    """A mixin for `Trainer` and classes derived from it. In a class of your own it goes first."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter, the tokenizer or processor, and the training arguments. `state_dict` is not used."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)  # type: ignore[arg-type]
        model = model_of(self)
        adapter_state.save(model, trained_adapter(model), folder)
        collator: Any = self.data_collator
        processor = self.processing_class or getattr(collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put a checkpoint's values into the attached adapter. Raises AdapterError if they do not fit."""
        model = model_of(self)
        adapter_state.restore(model, trained_adapter(model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Put the best checkpoint's values into the attached adapter."""
        best = self.state.best_model_checkpoint
        assert best is not None
        self._load_from_checkpoint(best)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the trainer's own optimizer; with LoRA+, give B and what takes its place their learning rate."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            own = model_of(self)
            name = trained_adapter(own)
            ratio = state_of(own).adapters[name].config.lora_plus
            if ratio is not None:
                _split(optimizer, faster_parameters(own, name), ratio)
        return optimizer

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint. The trainer copies the files that it knows; the adapter's are written again."""
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._save(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def _split(optimizer: torch.optim.Optimizer, faster: set[nn.Parameter], ratio: float) -> None:
    """Move these parameters of a new optimizer into groups of their own, at `ratio` times the learning rate."""
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in faster]
        if not own:
            continue
        options = {key: value for key, value in group.items() if key != "params"}
        group["params"] = [p for p in group["params"] if p not in faster]
        if not group["params"]:
            optimizer.param_groups.remove(group)
        optimizer.add_param_group({**options, "params": own, "lr": group["lr"] * ratio})


def adapter_trainer(trainer: T) -> T:
    """Make a trainer of transformers or TRL write, resume from and upload the adapter alone. Returns the same trainer.

    The model has one trained adapter of lorakit, and any number of frozen ones. A run resumes bit for bit when the same
    adapters are attached as before. Checkpoints from before this call, which hold the model too, can be resumed from.

    Raises StateError for a trainer whose adapter would not be trained or saved as expected: none or several trained,
    inactive, merged; FSDP and DeepSpeed; AdaLoRA; what PEFT's format cannot hold; an adapted output layer with TRL's
    fused one; sync_ref_model.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise StateError(
            f"adapter_trainer(trainer): got a {qualified_name(trainer)}\n"
            "  expected a transformers.Trainer, or a trainer of TRL, made of the model with its adapter"
        )
    if not isinstance(trainer, AdapterCheckpoints):
        model = model_of(trainer)
        check_trainer(trainer, model, trained_adapter(model))
        cls = type(trainer)
        # Under its own name, which TRL puts into model cards.
        trainer.__class__ = type(cls.__name__, (AdapterCheckpoints, cls), {"__module__": cls.__module__})
    return trainer  # type: ignore[return-value]
