"""PiSSA, MiLoRA and OLoRA: what is subtracted, that the base is never changed, and that training is PEFT's."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import logits
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, TargetError
from lorakit.layers.init import svd
from lorakit.layers.layer import child_name

STARTS = ("pissa", "milora", "olora")
MODELS = {
    "llama": (tiny.llama, ["q_proj", "k_proj", "down_proj"]),
    "gpt2": (tiny.gpt2, ["c_attn", "mlp.c_proj"]),
    "packed": (tiny.gpt2, ["c_attn"]),
    "convolutions": (tiny.cnn, ["conv1", "conv2", "conv2_circular", "conv3"]),
    "grouped": (lambda: tiny.cnn(groups=2), ["conv2"]),
    "embedding": (tiny.embedder, ["emb"]),
}
PACKED = {"packed": {"packed": {"c_attn": [True, False, True]}}}


def config(kind: str, init: str, **settings) -> lk.LoraConfig:
    return lk.LoraConfig(rank=2, alpha=3, targets=MODELS[kind][1], init=init, **(PACKED.get(kind, {}) | settings))


def updates(model: nn.Module, name: str = "default"):
    return {n: m for n, m in model.named_modules() if n.endswith(f".{child_name(name)}") or n == child_name(name)}


def start_of(update) -> tuple[torch.Tensor, torch.Tensor]:
    return update.A0.flatten(1), update.B0.flatten(1)


def matrix(layer: nn.Module) -> torch.Tensor:
    W = layer.weight.detach().double()
    return W.T if layer.lora_transposed else W.flatten(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "convolutions", "grouped", "embedding"])
@pytest.mark.parametrize("init", STARTS)
def test_what_is_subtracted_is_the_papers_part_of_the_weight(kind, init):
    model = lk.attach(MODELS[kind][0](), config(kind, init))
    for name, update in updates(model).items():
        W = matrix(model.get_submodule(name.rpartition(".")[0]))
        A, B = start_of(update)
        found = update.scale * B.double() @ A.double()
        if init == "olora":
            Q, R = torch.linalg.qr(W)
            expected = update.scale * Q[:, :2] @ R[:2]
        else:
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)
            part = slice(0, 2) if init == "pissa" else slice(-2, None)
            expected = U[:, part] * S[part] @ Vt[part]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_each_adapted_part_of_a_packed_projection_starts_from_its_own_rows():
    model = lk.attach(tiny.gpt2(), config("packed", "pissa"))
    layer = model.transformer.h[0].attn.c_attn
    update = layer.lora_default
    W = matrix(layer)
    for at, part in enumerate((0, 2)):
        rows = W[part * 16 : part * 16 + 16]
        U, S, Vt = torch.linalg.svd(rows, full_matrices=False)
        found = update.scale * update.B0[at].double() @ update.A0[2 * at : 2 * at + 2].double()
        torch.testing.assert_close(found, U[:, :2] * S[:2] @ Vt[:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("init", STARTS)
def test_the_base_keeps_its_bits_whatever_is_active(kind, init):
    model = MODELS[kind][0]()
    before, bits = logits(model), tiny.bits(model)
    lk.attach(model, config(kind, init))
    assert torch.equal(logits(model), before)  # ΔW is zero to the bit
    tiny.randomise_factors(model)
    changed = logits(model)
    assert (changed - before).abs().max() > 1e-3
    lk.merge(model)
    torch.testing.assert_close(logits(model), changed, atol=1e-5, rtol=1e-4)
    lk.unmerge(model)
    lk.activate(model, None)
    assert torch.equal(logits(model), before)
    assert tiny.same_bits(bits, tiny.bits(model))
    lk.detach(model)
    assert tiny.same_bits(bits, dict(model.state_dict()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rslora", [False, True])
def test_its_value_is_a_plain_lora_of_twice_the_rank(kind, rslora, tmp_path):
    model = MODELS[kind][0]()
    lk.attach(model, config(kind, "pissa", rslora=rslora))
    tiny.randomise_factors(model)
    value = lk.capture(model)
    assert {f.rank for f in value.factors.values()} == {4} == {value.config.rank}
    assert value.config.init == "default"
    assert {round(f.scale, 6) for f in value.factors.values()} == {round(3 / (2**0.5 if rslora else 2), 6)}
    value.save(tmp_path)
    again = lk.attach(MODELS[kind][0](), lk.Adapter.load(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("init", STARTS)
def test_peft_computes_the_same_with_the_saved_adapter(kind, init, tmp_path):
    model = MODELS[kind][0]()
    lk.attach(model, config(kind, init, rank_pattern={MODELS[kind][1][0]: 3}))
    tiny.randomise_factors(model)
    lk.capture(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[kind][0](), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    assert theirs.peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_from_it_is_pefts(init):
    """PEFT changes the base. After some steps of SGD the effective weights W + ΔW are the same."""
    targets = ["q_proj", "down_proj"]
    ours, theirs = tiny.llama().train(), tiny.llama().train()
    lk.attach(ours, lk.LoraConfig(rank=2, alpha=3, targets=targets, init=init))
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=init)
    )
    for name, update in updates(ours).items():
        other = theirs.base_model.model.get_submodule(name.rpartition(".")[0])
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(update.B @ update.A, B @ A, atol=1e-5, rtol=1e-4)
        with torch.no_grad():  # the signs of singular vectors are free
            A.copy_(update.A), B.copy_(update.B)
    ids = torch.randint(3, tiny.VOCAB, (5, 2, 9), generator=torch.Generator().manual_seed(3))
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
        for batch in ids:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = 0.0
    for name, update in updates(ours).items():
        layer = ours.get_submodule(name.rpartition(".")[0])
        other = theirs.base_model.model.get_submodule(name.rpartition(".")[0])
        value = update.value(layer).delta()
        torch.testing.assert_close(
            layer.weight + value, other.base_layer.weight + other.get_delta_weight("default"), atol=1e-5, rtol=1e-4
        )
        moved = max(moved, float(value.abs().max()))
    assert moved > 1e-3


def test_in_16_bits_the_start_is_exact_and_small_steps_are_not_lost():
    model, exact = tiny.llama(dtype=torch.bfloat16), tiny.llama()
    before = logits(model)
    lk.attach(model, config("llama", "pissa"))
    lk.attach(exact, config("llama", "pissa"))
    assert torch.equal(logits(model), before)
    for each in (model, exact):
        with torch.no_grad():
            for update in updates(each).values():
                update.B += 1e-3 * torch.ones_like(update.B)  # less than bfloat16 resolves beside B
    layer = "model.layers.0.self_attn.q_proj"
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = {
            each: module(x.to(module.weight.dtype)).float()
            - nn.functional.linear(x.to(module.weight), module.weight).float()
            for each, module in (("16", model.get_submodule(layer)), ("32", exact.get_submodule(layer)))
        }
    expected = x @ updates(exact)[f"{layer}.lora_default"].value(exact.get_submodule(layer)).delta().T
    torch.testing.assert_close(change["32"], expected, atol=1e-5, rtol=1e-3)
    assert (change["16"] - expected).abs().max() < 0.2 * expected.abs().max() + 4e-3


def test_dropout_masks_both_halves_alike():
    model = tiny.mlp().train()
    x = tiny.example(model)["x"]
    plain = model(x)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0", "lin1"], init="pissa", dropout=0.5))
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        for update in updates(model).values():
            update.A.mul_(1.5)
    outputs = [model(x) for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("grad", [False, True])
def test_rows_and_mixtures_of_adapters_are_right(grad):
    model = tiny.mlp()
    x = tiny.example(model)["x"]
    for name, init in (("a", "pissa"), ("b", "default"), ("c", "olora")):
        lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0", "lin1"], init=init), name, trainable=grad)
        with torch.no_grad():
            for update in updates(model, name).values():
                for p in update.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    choices = ["a", None, {"a": 0.5, "c": -2.0}, "b", "c"]
    expected = []
    for row, choice in zip(x, choices, strict=True):
        lk.activate(model, choice)
        expected.append(model(row[None]))
    for _ in range(2):  # the second time from the stacks
        with torch.set_grad_enabled(grad), lk.route(model, choices):
            torch.testing.assert_close(model(x), torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_frozen_one_follows_its_tensors_when_they_are_loaded_again():
    model = tiny.mlp()
    x = tiny.example(model)["x"]
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"], init="pissa"), trainable=False)
    tiny.randomise_factors(model)
    with torch.no_grad():
        first = model(x)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        assert torch.equal(model(x), first)
        model.lin0.lora_default.A0.mul_(2)
        assert not torch.equal(model(x), first)
        model.load_state_dict(state)
        assert torch.equal(model(x), first)


def test_a_rank_beyond_the_weights_is_refused_with_one_that_fits():
    model = tiny.llama()
    with pytest.raises(TargetError, match=r"k_proj' is a matrix of 8 x 16.*\n.*rank_pattern=\{.*k_proj': 8\}"):
        lk.attach(model, lk.LoraConfig(rank=9, targets=["k_proj"], init="pissa"))
    assert not lk.adapters(model)


@pytest.mark.parametrize("variant", ["loha", "lokr", "vera", "adalora"])
def test_other_kinds_of_update_are_refused(variant):
    with pytest.raises(ConfigError, match=f"variant='{variant}' has others"):
        lk.attach(tiny.mlp(), lk.LoraConfig(rank=2, targets=["lin0"], init="pissa", variant=variant))


def test_weights_that_are_not_finite_are_refused():
    model = tiny.mlp()
    model.lin0.weight.data[0, 0] = float("nan")
    with pytest.raises(lk.LorakitError, match="lin0"):
        lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"], init="olora"))
    assert type(model.lin0) is nn.Linear


def test_of_a_large_weight_the_first_singular_values_are_found_almost_all(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_UP_TO", 10)
    made = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(300, 300, generator=made))[0] for _ in range(2))
    S = torch.logspace(0, -3, 300)
    found = svd.first(U * S @ V.T, 8)
    torch.testing.assert_close(found.S, S[:8], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.U * found.S @ found.Vt, U[:, :8] * S[:8] @ V[:, :8].T, atol=2e-2, rtol=0)


def test_without_gradients_it_follows_writes_that_are_not_counted_and_compiles():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10)).eval()
    lk.attach(model, lk.LoraConfig(rank=2, init="pissa", targets=["0"]))
    x = torch.randn(3, 20)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(x), compiled(x)
        model[0].lora_default.B.data.add_(0.5)  # as averages of parameters do that stand in for an evaluation
        expected = model[0].lora_default.value(model[0]).delta() @ x.T + F.linear(x, model[0].weight, model[0].bias).T
        for made in (model(x), compiled(x)):
            torch.testing.assert_close(made, expected.T)
