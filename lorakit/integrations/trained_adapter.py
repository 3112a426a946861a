"""Which adapter a trainer trains, and errors for set-ups that would train, save or compare something else."""

from __future__ import annotations

import warnings
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import LorakitWarning, StateError, listing
from ..formats.peft import losses
from ..layers.layer import LoraLayer, child_name
from ..layers.updates.update import LiveUpdate
from ..model.capture import as_value
from ..model.sharded import how_sharded
from ..model.state import STATE, State, architecture_of, layer_at, names_of, saved_parameters, state_of
from ..model.training import faster_parameters

if TYPE_CHECKING:
    from transformers import Trainer


def model_of(trainer: Trainer) -> nn.Module:
    """Return a trainer's model without wrappers of accelerate and torch.compile."""
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model


def trained_adapter(model: nn.Module) -> str:
    """Return the name of the adapter that is trained. Raises StateError unless there is exactly one, and it is active,
    unmerged, and all that is trained.
    """
    if STATE not in model.__dict__ and hasattr(model, "get_base_model"):
        raise StateError(
            f"the trainer's model is a {type(model).__name__} of PEFT\n"
            "  give the trainer no peft_config: lorakit.attach(model, ...) has prepared the model"
        )
    state = state_of(model)
    trained = [name for name, attached in state.adapters.items() if attached.trainable]
    if not trained:
        first = next(iter(state.adapters))
        raise StateError(
            f"no attached adapter is trained ({listing(state.adapters)}: frozen, as an attached lorakit.Adapter is)\n"
            f"  detach it, and attach it for training: lorakit.attach(model, adapter, '{first}', trainable=True)"
        )
    if len(trained) > 1:
        raise StateError(
            f"{len(trained)} attached adapters are trained ({listing(trained)}), and a checkpoint holds one\n"
            "  attach the others frozen: lorakit.attach(model, lorakit.capture(model, NAME), NAME, trainable=False)"
        )
    name = trained[0]
    if state.merged is not None:
        raise StateError(f"{names_of(state.merged)} is merged into the base\n  call lorakit.unmerge(model) first")
    if name not in state.active:
        raise StateError(
            f"adapter '{name}' is to be trained, and is not active; {names_of(state.active) or 'the base alone'} is\n"
            f"  call lorakit.activate(model, '{name}') first"
        )
    _check_all_saved(model, state, name)
    return name


def _check_all_saved(model: nn.Module, state: State, name: str) -> None:
    """Raise StateError if parameters are trained that are not the adapter's, or none of the adapter's is."""
    own = {id(p) for _, p in saved_parameters(model, state, name)}
    own |= {id(p) for update in updates_of(model, name).values() for p in update.parameters()}
    trained = {full: p for full, p in model.named_parameters() if p.requires_grad}
    others = [full for full, p in trained.items() if id(p) not in own]
    if others:
        raise StateError(
            f"{listing(others, 3)} would be trained too, and the adapter does not hold it\n"
            "  freeze it: parameter.requires_grad_(False); or let the adapter hold it: LoraConfig(save_modules=[...])"
        )
    if not trained:
        raise StateError(
            f"every parameter of adapter '{name}' has been frozen since it was attached\n"
            "  attach it again with trainable=True"
        )


def updates_of(model: nn.Module, name: str) -> dict[str, LiveUpdate]:
    """Return an adapter's live updates by module; a weight that two modules share has one."""
    child = child_name(name)
    found = {m: layer_at(model, m)._modules[child] for m in state_of(model).adapters[name].modules}
    return {m: update for m, update in found.items() if not update.tied}


def check_trainer(trainer: Trainer, model: nn.Module, name: str) -> None:
    """Raise StateError for what the trainer would do wrong with adapter `name`; warn of a needless reference model."""
    _check_not_sharded(trainer, model)
    args: Any = trainer.args
    if getattr(args, "sync_ref_model", False):
        raise StateError(
            "sync_ref_model=True writes a mixture of the trained model's parameters into the reference's, which are "
            "the base's own\n  leave it out"
        )
    config = state_of(model).adapters[name].config
    if config.lora_plus is not None:
        faster_parameters(model, name)  # ConfigError if there are none
    lost = losses(as_value(model, name))
    if lost:
        raise StateError(f"PEFT's format, which checkpoints have, cannot hold all of '{name}'\n  " + "\n  ".join(lost))
    own_steps = sorted({type(u).__name__ for u in updates_of(model, name).values() if _needs_own_steps(type(u))})
    if own_steps:
        raise StateError(
            f"{own_steps[0]} adds a penalty to the loss or adjusts its ranks after each step; a Trainer would not\n"
            f"  use lorakit train --variant {config.variant}, or a loop of your own with lorakit.penalty and after_step"
        )
    _check_output_layer(model)
    _warn_of_copy(trainer, model)


def _check_not_sharded(trainer: Trainer, model: nn.Module) -> None:
    how = (
        "DeepSpeed"
        if trainer.is_deepspeed_enabled
        else "FSDP"
        if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled
        else None
    )
    sharded = how_sharded(model)
    if how is not None or sharded is not None:
        raise StateError(
            f"{'the trainer uses ' + how if how is not None else sharded}: its processes hold parts of the parameters, "
            "and adapter checkpoints need all of them\n"
            "  let every process hold the model (torchrun or accelerate launch without FSDP and DeepSpeed); a large "
            "base may be quantized"
        )


def _needs_own_steps(kind: type[LiveUpdate]) -> bool:
    own: list[Any] = [kind.penalty, kind.after_step]
    base: list[Any] = [LiveUpdate.penalty, LiveUpdate.after_step]
    return any(a.__func__ is not b.__func__ for a, b in zip(own, base, strict=True))


def _check_output_layer(model: Any) -> None:
    """Raise StateError if the output layer is adapted, and the trainer multiplies by its weight without calling it.

    TRL replaces the model's forward by one that does, to save the memory of the logits.
    """
    forward = model.__dict__.get("forward")
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    if code is None or "get_output_embeddings" not in _names(code):
        return
    output = model.get_output_embeddings()
    if isinstance(output, LoraLayer):
        raise StateError(
            f"the output layer ({architecture_of(output)}) has an update, and the trainer computes the loss from its "
            "weight alone: the update would have no effect and not be trained\n"
            "  train it in full instead, LoraConfig(save_modules=['lm_head']), or leave it out of targets and "
            "trainable_tokens"
        )


def _names(code: CodeType) -> set[str]:
    """The names that a function uses, and those inside it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _warn_of_copy(trainer: Any, model: nn.Module) -> None:
    copy = getattr(trainer, "ref_model", None)
    if not isinstance(copy, nn.Module):
        return
    shared = {id(p) for p in model.parameters()}
    own = sum(p.numel() for p in copy.parameters() if id(p) not in shared)
    if own > sum(p.numel() for p in copy.parameters()) // 2:
        warnings.warn(
            f"the trainer's reference is a second model of {own:,} parameters, loaded from "
            f"{getattr(copy, 'name_or_path', None) or 'its checkpoint'}. Without it: "
            "ref_model=lorakit.integrations.reference(model)",
            LorakitWarning,
            stacklevel=4,
        )
