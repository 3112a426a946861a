"""EVA and LoRA-GA, made from the first batches: PEFT's, the papers' equations, and a model that is left alone."""

from __future__ import annotations

import peft
import pytest
import quantized
import tiny
import torch
from tiny import logits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.errors import ConfigError, StateError, TargetError
from lorakit.layers.bases import base_of
from lorakit.layers.init import lora_ga

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


def batch(seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, tiny.VOCAB, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def llama() -> nn.Module:
    """With larger weights, and embeddings that vary in few directions: what explains its modules' inputs differs."""
    model = tiny.llama()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(20)
        model.model.embed_tokens.weight.mul_(0.6 ** torch.arange(16))
    return model


def config(init: str, **settings) -> lk.LoraConfig:
    return lk.LoraConfig(**{"rank": 2, "alpha": 3.0, "targets": TARGETS, "init": init} | settings)


def updates(model: nn.Module):
    return {n.removesuffix(".lora_default"): m for n, m in model.named_modules() if n.endswith(".lora_default")}


def same_space(A: Tensor, B: Tensor) -> None:
    """The rows of both are orthonormal and span the same space."""
    assert A.shape == B.shape
    overlap = torch.linalg.svdvals(A.double() @ B.double().T)
    torch.testing.assert_close(overlap, torch.ones_like(overlap), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------- EVA


@pytest.mark.parametrize("rank, rho", [(8, 1.0), (4, 2.0)])  # with others PEFT's randomized SVD is less exact
def test_eva_has_pefts_ranks_scales_and_directions(rank, rho):
    targets = ["q_proj", "k_proj", "o_proj", "up_proj"]  # inputs of 16
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(
            r=rank, lora_alpha=3, target_modules=targets, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho)
        ),
    )
    peft.initialize_lora_eva_weights(theirs, [batch()], show_progress_bar=False)
    model = lk.attach(llama(), config("eva", eva_rho=rho, rank=rank, targets=targets), batches=[batch()])
    inner = theirs.base_model.model
    ranks = {}
    for name, update in updates(model).items():
        other = inner.get_submodule(name)
        A = other.lora_A["default"].weight
        ranks[name] = update.rank
        assert update.rank == A.shape[0]
        assert update.scale == pytest.approx(other.scaling["default"])
        same_space(update.A, A)
        signs = (update.A * A).sum(1).sign()
        torch.testing.assert_close(update.A, signs[:, None] * A, atol=1e-3, rtol=0)
        assert not update.B.any()
    adapted = {n for n, m in inner.named_modules() if hasattr(m, "lora_A")}
    assert ranks.keys() == adapted
    assert sum(ranks.values()) == rank * 8  # the budget of eight modules
    assert (len(set(ranks.values())) > 1) == (rho > 1)
    skipped = lk.summary(model).skipped
    assert len(skipped) == 8 - len(ranks)
    assert all("EVA gives it no rank" in why for why in skipped.values())


def test_eva_over_several_batches_is_the_svd_of_all_inputs():
    model, seen = tiny.llama(), []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batches = [batch(seed) for seed in range(3)]
    with torch.no_grad():
        for each in batches:
            model(**each)
    handle.remove()
    counted = torch.cat([x[(b["labels"] != -100) & b["attention_mask"].bool()] for x, b in zip(seen, batches)])
    _, _, Vt = torch.linalg.svd(counted.double() - counted.double().mean(0), full_matrices=False)
    lk.attach(model, config("eva", targets=["down_proj"], rank=3, eva_rho=1.0), batches=iter(batches))
    same_space(layer.lora_default.A.detach(), Vt[:3])


def test_eva_of_a_convolution_sees_the_patches_of_its_kernel():
    model = tiny.cnn(groups=2)
    x = tiny.example(model)["x"]
    names = ["conv1", "conv2", "conv2_circular", "conv3"]
    inputs = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: inputs.update({n: args[0].detach()}))
        for n in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    lk.attach(model, config("eva", targets=names, eva_rho=1.0), batches=[x])
    for name in names:
        layer = model.get_submodule(name)
        # A patch is what the convolution multiplies: convolve with each unit kernel.
        size = layer.weight[0].numel()
        eye = (
            torch.eye(size)
            .view(size, *layer.weight.shape[1:])
            .repeat(layer.groups, *(1 for _ in layer.weight.shape[1:]))
        )
        own = layer._conv_forward(inputs[name], eye, None)  # [batch, g · size, *places]
        rows = own.unflatten(1, (layer.groups, size)).movedim(2, -1).reshape(-1, size).double()
        _, _, Vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        same_space(layer.lora_default.A.detach().flatten(1), Vt[:2])


def test_evas_adapter_goes_to_peft_with_its_ranks(tmp_path):
    model = lk.attach(llama(), config("eva", rank=4), batches=[batch()])
    tiny.randomise_factors(model)
    value = lk.capture(model)
    assert value.config.rank_pattern
    value.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------- LoRA-GA


def check_ga(update, G: Tensor, rank: int) -> None:
    """The paper's equation, in float64, up to the signs of singular vectors."""
    U, _, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    size = G.shape[0] ** 0.25 / 16**0.5
    for found, expected in (
        (update.A.detach().flatten(1).double(), size * Vt[:rank]),
        (update.B.detach().flatten(1).double().T, size * U[:, rank : 2 * rank].T),
    ):
        signs = (found * expected).sum(1).sign()
        torch.testing.assert_close(found, signs[:, None] * expected, atol=1e-3, rtol=1e-3)


def gradients(model: nn.Module, names: list[str], losses) -> dict[str, Tensor]:
    """What autograd gives, of float64 parameters."""
    weights = {n: model.get_submodule(n).weight.requires_grad_(True) for n in names}
    for loss in losses():
        loss.backward()
    return {n: w.grad.clone() for n, w in weights.items()}


def test_lora_ga_is_the_papers_equation_of_the_gradient():
    batches = [batch(seed) for seed in range(2)]
    reference = tiny.llama(dtype=torch.float64)
    model = lk.attach(tiny.llama(dtype=torch.float64), config("lora_ga"), batches=batches)
    before = gradients(reference, list(updates(model)), lambda: (reference(**each).loss for each in batches))
    for name, update in updates(model).items():
        check_ga(update, before[name], 2)
    assert torch.equal(logits(model), logits(tiny.llama(dtype=torch.float64)))


def test_lora_ga_of_other_models_and_layers_through_a_loss():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", stride=2, groups=2)
            self.first, self.second = Conv1D(12, 8), nn.Linear(12, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu_(self.first(torch.relu_(self.conv(x)).mean((2, 3)))))

    torch.manual_seed(0)
    model = Net().double()
    data = [(torch.randn(5, 4, 6, 6, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)) for _ in range(2)]

    def loss(net: nn.Module, pair) -> Tensor:
        return (net(pair[0]) - pair[1]).square().mean()

    names = ["conv", "first", "second"]
    expected = gradients(model, names, lambda: (loss(model, pair) for pair in data))
    model.zero_grad()
    lk.attach(model, config("lora_ga", targets=names), batches=data, loss=loss)
    check_ga(model.conv.lora_default, expected["conv"].flatten(1), 2)
    check_ga(model.first.lora_default, expected["first"].T, 2)
    check_ga(model.second.lora_default, expected["second"], 2)


def test_with_less_memory_for_gradients_the_start_is_the_same(monkeypatch):
    whole = lk.attach(tiny.llama(), config("lora_ga"), batches=[batch()])
    monkeypatch.setattr(lora_ga, "GRADIENT_BYTES", 1500)
    parts = lk.attach(tiny.llama(), config("lora_ga"), batches=[batch()])
    for name, update in updates(parts).items():
        assert all(torch.equal(*pair) for pair in zip(update.parameters(), updates(whole)[name].parameters()))


# ------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_modes_flags_gradients_and_random_numbers_are_as_before(init):
    model = tiny.llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model(**batch()).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    modes = {n: m.training for n, m in model.named_modules()}
    bits = tiny.bits(model)
    random = torch.get_rng_state()
    lk.attach(model, config("default"))
    expected = torch.rand(3)
    lk.detach(model)
    torch.set_rng_state(random)
    seen = []

    def loss(net, each):
        seen.append(torch.rand(1))  # as a task may draw noise
        return net(**each).loss

    settings = {"eva_rho": 1.0} if init == "eva" else {}  # with other ranks, other random factors are drawn first
    lk.attach(model, config(init, **settings), batches=(batch(i) for i in range(99)), loss=loss)
    assert len(seen) == 8  # init_batches
    assert torch.equal(torch.rand(3), expected)
    assert {n: m.training for n, m in model.named_modules() if "lora_" not in n} == modes
    lk.detach(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n != "model.embed_tokens.weight"
    }
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if n in grads)
    assert tiny.same_bits(bits, tiny.bits(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_it_starts_from_the_base_beside_another_active_adapter(init):
    alone = lk.attach(tiny.llama(), config(init), batches=[batch()])
    model = lk.attach(tiny.llama(), lk.LoraConfig(rank=2, targets=["q_proj", "v_proj"]), "other", trainable=True)
    tiny.randomise_factors(model)
    lk.attach(model, config(init), batches=[batch()], activate=False)
    assert lk.active(model) == {"other": 1.0}
    for name, update in updates(model).items():
        other = updates(alone)[name]
        torch.testing.assert_close(update.A.abs(), other.A.abs(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(update.B.abs(), other.B.abs(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_base_in_4_bits_starts_as_its_dequantized_weights_do_and_can_be_trained(init, tmp_path):
    """On a CPU that can, bitsandbytes repacks a weight in its first evaluation, and no gradient passes it any more."""
    quantized.llama().save_pretrained(tmp_path)
    packed = quantized.in_4_bits(tmp_path, bnb_4bit_compute_dtype=torch.float32)
    dense = quantized.llama()
    with torch.no_grad():
        for name, module in dense.named_modules():
            if base_of(other := packed.get_submodule(name)).quantization is not None:
                module.weight.copy_(base_of(other).dense(other))
    for model in (packed, dense):
        lk.attach(model, config(init), batches=[batch()])
    for name, update in updates(packed).items():
        other = updates(dense)[name]
        for half in ("A", "B"):
            found, expected = getattr(update, half), getattr(other, half)
            torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-3, rtol=1e-2)
    packed.train()(**batch()).loss.backward()
    first = packed.model.layers[0].self_attn.q_proj
    assert first.lora_default.B.grad.any()
    base_of(first).check(first, "q_proj", True)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_without_data_it_says_what_to_give(init):
    model = tiny.llama()
    with pytest.raises(ConfigError, match=r"attach was given none\n.*batches=loader"):
        lk.attach(model, config(init))
    with pytest.raises(ConfigError, match="has no batch"):
        lk.attach(model, config(init), batches=[])
    with pytest.raises(ConfigError, match="there are no batches"):
        lk.attach(model, config(init), loss=lambda m, b: m(**b).loss)
    with pytest.raises(ConfigError, match="how the model takes a batch is not known: it is a list"):
        lk.attach(model, config(init), batches=[[1, 2]])
    assert not lk.adapters(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_what_a_start_does_not_use_is_refused():
    with pytest.raises(ConfigError, match="is for init='eva' or 'lora_ga'"):
        lk.attach(tiny.llama(), config("pissa"), batches=[batch()])
    value = lk.capture(lk.attach(tiny.llama(), config("default")))
    with pytest.raises(ConfigError, match="trained already"):
        lk.attach(tiny.llama(), value, batches=[batch()])


def test_losses_that_lead_nowhere_are_refused():
    model = tiny.llama()
    ids = {"input_ids": batch()["input_ids"]}
    with pytest.raises(ConfigError, match="no loss"):
        lk.attach(model, config("lora_ga"), batches=[ids])
    with pytest.raises(ConfigError, match=r"tensor of shape \[4, 9, 48\]"):
        lk.attach(model, config("lora_ga"), batches=[ids], loss=lambda m, b: m(**b).logits)
    with pytest.raises(ConfigError, match="does not depend on the modules"):
        lk.attach(model, config("lora_ga"), batches=[ids], loss=lambda m, b: torch.zeros(()))
    with pytest.raises(StateError, match=r"gradient of '.*q_proj' in the first batches is zero"):
        lk.attach(model, config("lora_ga"), batches=[ids], loss=lambda m, b: m(**b).logits.sum() * 0)


def test_modules_that_the_batches_do_not_reach_are_refused():
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "unused": nn.Linear(6, 6)})
    for init in ("eva", "lora_ga"):
        with pytest.raises(StateError, match="unused"):
            lk.attach(
                model,
                config(init, targets=["used", "unused"]),
                batches=[torch.randn(20, 6)],
                loss=lambda m, x: m["used"](x).square().sum(),
            )


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_module_of_several_inputs_is_refused(init):
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Sequential(Two(6, 6))
    with pytest.raises(TargetError, match="'0' does not map one tensor to another"):
        lk.attach(model, config(init, targets=["0"]), batches=[torch.randn(9, 6)], loss=lambda m, x: m(x)[0].sum())


@pytest.mark.parametrize("init", ["eva", "lora_ga", "loftq"])
def test_an_embedding_is_refused(init):
    with pytest.raises(TargetError, match=r"'emb' is a Embedding|'emb' is an Embedding"):
        lk.attach(tiny.embedder(), config(init, targets=["emb"]), batches=None)


def test_too_few_rows_for_the_rank_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(StateError, match=r"'0' vary in 2 directions only, in the 3 rows.*rank 4"):
        lk.attach(model, config("eva", rank=4, targets=["0"]), batches=[torch.randn(3, 8)])
