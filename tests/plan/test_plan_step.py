"""A step on shapes: that it sees what a real one does, that two and three layers tell all, that it takes no memory."""

from __future__ import annotations

import pytest
import tiny
import tiny_lm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.bases.limits import resident
from lorakit.config import LoraConfig
from lorakit.errors import TrainError
from lorakit.model.attach import attach
from lorakit.ops import IGNORE_INDEX
from lorakit.plan import step as step_file
from lorakit.plan.live import Live
from lorakit.plan.shell import PlanError, Shell
from lorakit.plan.step import evaluation, training_step
from lorakit.tasks import causal_lm
from lorakit.tasks.text import causal_loss as loss_file
from lorakit.tasks.text.causal_loss import row_losses, summed_loss
from lorakit.train.config import TrainConfig


def config(layers: int = 6, **changes):
    from transformers import LlamaConfig

    values = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(**values | changes)


def batch(rows: int = 2, length: int = 96, untrained: int = 40):
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 250, (rows, length), generator=made)
    labels = ids.clone()
    labels[:, :untrained] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora(**settings):
    """Puts such an adapter on a model."""
    return lambda model: attach(model, LoraConfig(**settings))


def nothing(model) -> None:
    """Full fine-tuning: all of the base trains."""


def planned_of(base, dtype, attach, **options) -> Shell:
    return Shell(type(base).__name__, lambda: causal_lm.skeleton(TrainConfig(data="-"), base, dtype), attach, **options)


def shell(
    layers: int = 6, full: bool = False, checkpointing: bool = False, plain: bool = False, dtype=torch.float32
) -> Shell:
    made = planned_of(config(layers), dtype, nothing if full else lora(rank=4), checkpointing=checkpointing)
    made.attention(plain)
    return made


KINDS = [
    {},
    {"full": True},
    {"checkpointing": True},
    {"full": True, "plain": True},
    {"full": True, "checkpointing": True},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulating", [False, True])
def test_two_and_three_layers_tell_the_step_through_all(kind, accumulating):
    folded, whole = shell(**kind), shell(**kind)
    assert folded.foldable
    whole.foldable = False
    for each in (folded, whole):  # the loss looks at a model once
        training_step(each, batch(), summed_loss, accumulating)
    one, other = (training_step(s, batch(), summed_loss, accumulating) for s in (folded, whole))
    assert one.flops == other.flops
    assert {s: sum(v for p, v in parts.items()) for s, parts in one.stretches.items()} == {
        s: sum(v for p, v in parts.items()) for s, parts in other.stretches.items()
    }


class Plain(TorchDispatchMode):
    """Operations as they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_shapes_sees_what_a_real_step_makes(kind, monkeypatch):
    """The same counting around the real model with real tensors, which nothing but the counting shares with the run on
    shapes.
    """
    from transformers import AutoModelForCausalLM

    planned = shell(layers=2, **kind)
    expected = training_step(planned, batch(), summed_loss, False)
    torch.manual_seed(0)
    real = AutoModelForCausalLM.from_config(config(2), dtype=kind.get("dtype", torch.float32))
    if not kind.get("full"):
        attach(real, LoraConfig(rank=4))
    if kind.get("checkpointing"):
        real.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        real.enable_input_require_grads()
    if kind.get("plain"):
        real.set_attn_implementation("eager")
    real.train()
    planned.model, planned.stack, planned.shapes = real, real.model.layers, Plain()
    monkeypatch.setattr(step_file, "without_memory", lambda model: [*model.parameters(), *model.buffers()])
    seen = training_step(planned, batch(), summed_loss, False)
    for stretch, parts in seen.stretches.items():
        assert sum(expected.stretches[stretch].values()) == pytest.approx(sum(parts.values()), rel=0.01), stretch


def test_a_model_of_unequal_layers_is_run_whole():
    made = planned_of(config(6), torch.float32, lora(rank=4, layers=[1, 4]))
    assert not made.foldable
    adapted = planned_of(config(6), torch.float32, lora(rank=4, rank_pattern={"layers.3.self_attn.q_proj": 8}))
    assert not adapted.foldable
    assert training_step(made, batch(), summed_loss, False).stretches["loss"]["loss"] > 0


def test_no_memory_is_taken_for_seventy_billion_parameters():
    before = resident()
    made = planned_of(
        config(
            80,
            hidden_size=8192,
            intermediate_size=28672,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        torch.bfloat16,
        lora(rank=16),
    )
    traced = training_step(made, batch(1, 1024), summed_loss, False)
    assert made.frozen_bytes() > 130e9
    assert sum(traced.stretches["loss"].values()) > 10e9
    assert resident() - before < 400e6


def test_more_trained_positions_need_more_for_the_loss():
    some, all_of_them = (
        training_step(shell(), batch(untrained=n), summed_loss, False).stretches["loss"]["loss"] for n in (80, 0)
    )
    assert all_of_them > 2 * some


def test_a_loss_in_chunks_is_planned_in_chunks(monkeypatch):
    whole = training_step(shell(full=True), batch(untrained=0), summed_loss, False)
    monkeypatch.setattr(loss_file, "MAX_LOGITS_BYTES", 1 << 16)
    parts = training_step(shell(full=True), batch(untrained=0), summed_loss, False)
    assert parts.stretches["loss"]["loss"] < 0.6 * whole.stretches["loss"]["loss"]


def test_checkpointing_keeps_less_and_computes_more():
    plain, again = (training_step(shell(checkpointing=c), batch(), summed_loss, False) for c in (False, True))
    assert again.stretches["loss"]["activations"] < 0.5 * plain.stretches["loss"]["activations"]
    assert again.flops > plain.flops


def test_plain_attention_grows_with_the_square_of_the_length():
    kept = [
        training_step(shell(full=True, plain=True), batch(1, n), summed_loss, False).stretches["loss"]["activations"]
        for n in (64, 128, 256)
    ]
    assert kept[2] - 2 * kept[1] > kept[1] - 2 * kept[0] > 0


def test_an_evaluation_keeps_nothing_for_backward():
    made = shell()
    held_out = evaluation(made, batch(), row_losses)
    trained = training_step(made, batch(), summed_loss, False)
    assert sum(held_out.stretches["evaluation"].values()) < sum(trained.stretches["loss"].values())
    assert made.model.training


def test_other_architectures_can_be_planned():
    for model, adapter in (
        (tiny_lm.gpt2(), lora(rank=4)),
        (tiny.llama(tied=True), lora(rank=4, save_modules=["lm_head"])),
    ):
        made = planned_of(model.config, torch.float32, adapter)
        traced = training_step(made, batch(1, 24, 8) if model.config.vocab_size > 250 else _small(), summed_loss, False)
        assert traced.stretches["loss"]["loss"] > 0
        assert made.base_parameters() == sum(p.numel() for p in model.parameters())


def _small():
    ids = torch.randint(2, 40, (1, 24))
    return {"input_ids": ids, "labels": ids}


def test_a_step_that_asks_for_numbers_is_an_error_that_says_so():
    made = shell()

    def asks(model: nn.Module, given):
        return summed_loss(model, given) * (1 if summed_loss(model, given).item() > 0 else 2)

    with pytest.raises(PlanError, match="LlamaForCausalLM cannot be estimated"):
        training_step(made, batch(), asks, False)


def test_an_encoder_decoder_is_not_planned_as_a_language_model():
    with pytest.raises(TrainError, match="use --task seq2seq"):
        planned_of(tiny.t5().config, torch.float32, lora(rank=4))


def test_a_storage_counts_once_and_until_its_last_view_is_gone():
    with Live() as live:
        a = torch.ones(1000)
        view = a[10:]
        assert live.bytes["working"] == 4000
        del a
        assert live.bytes["working"] == 4000
        view.mul_(2)
        live.purpose = "loss"
        b = view + 1
        live.rename(b, "gradients")
        assert (live.bytes["working"], live.bytes["gradients"]) == (4000, 3960)
        del view
        assert live.bytes["working"] == 0
    assert live.peaks["forward"]["working"] == 4000
