"""The loss over trained positions: its value and gradients against a plain computation in float64."""

from __future__ import annotations

import copy

import pytest
import tiny_lm
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.data.batches import collate
from lorakit.errors import TrainError
from lorakit.ops import IGNORE_INDEX
from lorakit.tasks.text import causal_loss as loss_module
from lorakit.tasks.text.causal_loss import row_losses, summed_loss

MAKERS = {"llama": tiny_lm.llama, "gpt2": tiny_lm.gpt2, "gemma2": tiny_lm.gemma2}
LENGTHS = (5, 23, 9, 14)  # none a multiple of 8: every row is padded


@pytest.fixture(params=MAKERS)
def model(request):
    """With an adapter whose ΔW is not zero, as training would leave it."""
    made = lk.attach(MAKERS[request.param]().eval(), lk.LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.05)
    return made


@pytest.fixture
def batch():
    return collate(tiny_lm.items(LENGTHS), tiny_lm.PAD)


def plain_loss(model, items) -> torch.Tensor:
    """Σ −log p(label | prefix), row by row without padding, all logits, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for item in items:
        ids = torch.tensor([item.ids])
        logits = model(input_ids=ids).logits[0]
        for at in range(1, len(item.ids)):
            if item.trained[at]:
                total = total - F.log_softmax(logits[at - 1], -1)[item.ids[at]]
    return total


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(ours, theirs, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0.1  # else equal gradients would mean nothing
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name].double(), gradient.double(), rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", ["its own", "eager"])
def test_it_is_the_plain_sum_over_trained_positions_of_a_padded_batch(model, batch, attention):
    if attention != "its own":
        model.set_attn_implementation(attention)
    exact = copy.deepcopy(model).double()
    expected = plain_loss(exact, tiny_lm.items(LENGTHS))
    found = summed_loss(model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model, found), gradients(exact, expected), 1e-4)


@pytest.mark.parametrize("attention", ["its own", "eager"])
def test_right_padding_needs_no_attention_mask(model, batch, attention):
    if attention != "its own":
        model.set_attn_implementation(attention)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    masked = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert summed_loss(model, batch).item() == pytest.approx(masked.item(), rel=1e-5)


def test_only_trained_positions_are_projected(model, batch, monkeypatch):
    monkeypatch.setattr(loss_module, "POSITIONS_MULTIPLE", 1)
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda layer, args, out: shapes.append(tuple(out.shape))
    )
    summed_loss(model, batch)
    handle.remove()
    trained = sum(sum(item.trained[1:]) for item in tiny_lm.items(LENGTHS))
    assert shapes == [(trained, 258)]
    assert int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) == trained < batch["labels"].numel() / 2


def test_logits_are_made_for_a_round_number_of_positions_without_changing_the_loss(model, batch, monkeypatch):
    results, sizes = [], []
    handle = model.get_output_embeddings().register_forward_hook(lambda layer, args, out: sizes.append(out.shape[0]))
    for positions in (1, 16, 10**6):  # the last asks for more than there are
        monkeypatch.setattr(loss_module, "POSITIONS_MULTIPLE", positions)
        results.append((summed_loss(model, batch), row_losses(model, batch)))
    handle.remove()
    everything = batch["labels"][:, 1:].numel()
    assert sizes[2] % 16 == 0
    assert sizes[0] < sizes[2] < sizes[4] == everything
    for whole, rows in results[1:]:
        torch.testing.assert_close(whole, results[0][0])
        torch.testing.assert_close(rows, results[0][1])


def test_soft_capped_logits_are_honoured(batch):
    """Without its cap Gemma's loss is another: the comparison above could tell."""
    model = tiny_lm.gemma2().eval()
    capped = summed_loss(model, batch).item()
    model.config.final_logit_softcapping = None
    assert abs(summed_loss(model, batch).item() - capped) > 0.01 * capped


@pytest.mark.parametrize("make", [tiny_lm.llama, tiny_lm.gpt2])
def test_chunks_give_the_same_value_and_gradients(make, batch, monkeypatch):
    model = lk.attach(make(), lk.LoraConfig(rank=4))
    whole = summed_loss(model, batch)
    expected = gradients(model, whole)
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 4 * 258 * 3)  # three rows of logits at once
    calls = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    chunked = summed_loss(model, batch)
    found = gradients(model, chunked)
    handle.remove()
    assert len(calls) > int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) // 3  # it did go in chunks
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    assert_same_gradients(found, expected, 1e-5)


def test_chunks_train_an_output_layer_that_has_a_dropout_of_its_own(batch, monkeypatch):
    """An adapted output layer draws another dropout at each call, which is no change of the logits after it."""
    model = lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4, dropout=0.5, targets=["lm_head", "q_proj"])).train()
    with torch.no_grad():
        model.lm_head.lora_default.B.normal_()
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 4 * 258 * 3)
    assert torch.isfinite(summed_loss(model, batch))


def test_chunks_of_soft_capped_logits_are_refused_with_what_to_do(batch, monkeypatch):
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 4 * 258 * 3)
    with pytest.raises(TrainError, match="changes its logits after the output layer") as error:
        summed_loss(tiny_lm.gemma2(), batch)
    assert "micro_batch" in str(error.value)


def test_the_loss_is_float32_for_a_bf16_base(batch):
    model = tiny_lm.llama()
    exact = summed_loss(model, batch).item()
    found = summed_loss(model.to(torch.bfloat16), batch)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=0.01)


def test_gradient_checkpointing_gives_the_same_gradients(batch):
    model = lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4, dropout=0.3)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.05)
    torch.manual_seed(3)
    expected = gradients(model, summed_loss(model, batch))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    recomputed = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: recomputed.append(1))
    torch.manual_seed(3)
    found = gradients(model, summed_loss(model, batch))
    handle.remove()
    assert len(recomputed) == 2  # forward, and again in backward
    assert_same_gradients(found, expected, 1e-6)


def test_the_hook_is_gone_afterwards_also_when_the_model_fails(batch):
    model = tiny_lm.llama()
    before = model(input_ids=batch["input_ids"]).logits
    summed_loss(model, batch)
    with pytest.raises(IndexError):
        summed_loss(model, batch | {"input_ids": torch.full_like(batch["input_ids"], 10_000)})
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


def test_a_model_without_an_output_layer_is_refused(batch):
    with pytest.raises(TrainError, match="LlamaModel has no output embeddings"):
        summed_loss(tiny_lm.llama().model, batch)


@pytest.fixture
def fused(monkeypatch) -> list[tuple[int, ...]]:
    """The hidden states' shape at each use of the one operation."""
    seen, real = [], loss_module.linear_cross_entropy
    monkeypatch.setattr(
        loss_module, "linear_cross_entropy", lambda h, *rest: seen.append(tuple(h.shape)) or real(h, *rest)
    )
    return seen


@pytest.mark.parametrize("make", [tiny_lm.llama, tiny_lm.gpt2])
def test_a_frozen_output_layer_and_the_loss_are_one_operation(make, batch, fused):
    model = lk.attach(make(), lk.LoraConfig(rank=4))
    shapes = []
    real = model.get_output_embeddings().forward
    model.get_output_embeddings().forward = lambda x: shapes.append(tuple(x.shape)) or real(x)
    expected = gradients(model, summed_loss(model, batch))
    assert fused == []  # a forward of its own has to be called
    del model.get_output_embeddings().forward
    found = gradients(model, summed_loss(model, batch))
    assert len(fused) == 1
    assert shapes[-1] == fused[0]
    assert_same_gradients(found, expected, 1e-5)


def test_what_the_one_operation_is_not_for(batch, fused):
    summed_loss(tiny_lm.gemma2(), batch)  # caps its logits
    summed_loss(tiny_lm.llama(), batch)  # trains its output layer
    adapted = lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4, targets=["lm_head", "q_proj"]))
    summed_loss(adapted, batch)
    hooked = lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4))
    handle = hooked.lm_head.register_forward_hook(lambda *_: None)
    summed_loss(hooked, batch)
    with torch.autocast("cpu", torch.bfloat16):
        summed_loss(lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4)), batch)
    assert fused == []
    handle.remove()
    summed_loss(hooked, batch)
    assert len(fused) == 1


def test_logits_that_are_all_zero_do_not_tell_that_nothing_comes_after_the_output_layer(batch, fused):
    model = lk.attach(tiny_lm.gemma2(), lk.LoraConfig(rank=4))
    output = model.get_output_embeddings().weight.data
    kept = output.clone()
    output.zero_()
    summed_loss(model, batch)
    output.copy_(kept)
    model.config.final_logit_softcapping = 0.1
    expected = (
        model(input_ids=batch["input_ids"])
        .logits[:, :-1]
        .log_softmax(-1)
        .gather(2, batch["labels"][:, 1:, None].clamp_min(0))[..., 0]
    )
    assert summed_loss(model, batch).item() == pytest.approx(
        -float(expected.detach()[batch["labels"][:, 1:] != IGNORE_INDEX].sum()), rel=1e-5
    )
    assert fused == []


def test_looking_what_comes_after_the_output_layer_draws_no_random_number(batch):
    losses = []
    model = lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4, dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    for _ in range(2):  # the first one looks
        torch.manual_seed(3)
        losses.append(summed_loss(model, batch).item())
    assert losses[0] == losses[1]
