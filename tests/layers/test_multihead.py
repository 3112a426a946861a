"""Adapted `nn.MultiheadAttention`: what PEFT computes, without a write to the base; in every operation."""

from __future__ import annotations

import copy
import itertools
import json

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, StateError, TargetError
from lorakit.layers.multihead import MultiheadLayer, changed

DIM, HEADS = 8, 2


class Attended(nn.Module):
    """A self-attention and a cross-attention, as OpenCLIP's blocks and its pooling have them."""

    def __init__(self, batch_first: bool = True, **settings) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, **settings)
        self.pool = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.probe = nn.Parameter(torch.randn(1, 3, DIM))
        self.head = nn.Linear(DIM, 4)
        self.batch_first = batch_first

    def forward(self, x: Tensor, **masks) -> Tensor:
        """x: [rows, tokens, dim]"""
        probe = self.probe.expand(len(x), -1, -1)
        if not self.batch_first:
            x, probe = x.transpose(0, 1), probe.transpose(0, 1)
        x, shares = self.attn(x, x, x, **masks)
        y, _ = self.pool(probe, x, x, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y) + (0 if shares is None else shares.square().sum())


def made(batch_first: bool = True, dtype: torch.dtype = torch.float32, **settings) -> Attended:
    torch.manual_seed(0)
    model = Attended(batch_first, **settings).to(dtype).eval()
    with torch.no_grad():  # torch starts the biases at zero
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def config(**settings) -> lk.LoraConfig:
    scale = {} if settings.get("variant") == "vera" else {"alpha": 6.0}  # VeRA has none
    return lk.LoraConfig(**{"rank": 2, "targets": ["attn", "pool"], **scale, **settings})


def randomise(model: nn.Module, name: str = "default", seed: int = 3, size: float = 0.5) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for full, p in model.named_parameters():
            if f".lora_{name}." in full:
                p.copy_(torch.randn(p.shape, generator=draw) * size)
    return model


def masks_of(kind: str, dtype: torch.dtype = torch.float32) -> dict:
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False, False] + [True] * 3])
    causal = torch.triu(torch.full((5, 5), float("-inf"), dtype=dtype), diagonal=1)
    return {
        "no masks": {},
        "no weights": {"need_weights": False},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
        "both": {"attn_mask": causal, "key_padding_mask": padding.to(dtype).masked_fill(padding, float("-inf"))},
        "a mask for each row": {"attn_mask": torch.randn(3 * HEADS, 5, 5, dtype=dtype), "average_attn_weights": False},
    }[kind]


MASKS = ["no masks", "no weights", "padding", "causal", "both", "a mask for each row"]


# ---------------------------------------------------------------------------------- what PEFT computes


def in_peft(folder, batch_first: bool, dtype: torch.dtype):
    return peft.PeftModel.from_pretrained(made(batch_first, dtype), folder, is_trainable=True).to(dtype).eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_logits_and_gradients_are_those_of_peft(masks, batch_first, tmp_path):
    dtype = torch.float64
    adapter = lk.capture(randomise(lk.attach(made(batch_first), config())))
    adapter.save(tmp_path)
    ours = lk.attach(made(batch_first, dtype), lk.Adapter.load(tmp_path), trainable=True).eval()
    theirs = in_peft(tmp_path, batch_first, dtype)
    x, settings = given(dtype).requires_grad_(), masks_of(masks, dtype)
    mine, other = ours(x, **settings), theirs(x, **settings)
    torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-10)
    assert (mine - made(batch_first, dtype)(x, **settings)).abs().max() > 1e-2
    (dx,) = torch.autograd.grad(mine.square().sum(), x, retain_graph=True)
    mine.square().sum().backward(inputs=[p for p in ours.parameters() if p.requires_grad])
    other.square().sum().backward()
    torch.testing.assert_close(dx, x.grad, atol=1e-8, rtol=1e-8)
    own = {n.replace(".lora_default.", "."): p.grad for n, p in ours.named_parameters() if ".lora_default." in n}
    found = 0
    for name, p in theirs.named_parameters():
        if ".lora_" in name:
            module, _, half = name.removesuffix(".default.weight").rpartition(".lora_")
            module = module.removeprefix("base_model.model.").replace(".base_layer", "")
            # PEFT applies out_proj's B twice and differentiates it once; ours is the doubled B, which A's gradient has.
            factor = 2 if module.endswith("out_proj") and half == "A" else 1
            torch.testing.assert_close(own[f"{module}.{half}"], factor * p.grad, atol=1e-8, rtol=1e-8)
            found += 1
    assert found == len(own) == 8


@pytest.mark.parametrize("packed", [None, [True, False, True]])
def test_an_adapter_of_peft_comes_back_the_same(packed, tmp_path):
    theirs = peft.get_peft_model(
        made(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn"], init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert set(adapter.updates) == {"attn", "attn.out_proj"}
    ours = lk.attach(made(), adapter).eval()
    torch.testing.assert_close(ours(given()), theirs(given()), atol=1e-5, rtol=1e-5)
    if packed is not None:  # of another rank than out_proj has, then
        ours = randomise(lk.attach(made(), config(targets=["attn"], packed={"attn": packed})))
    with pytest.warns(lk.errors.LorakitWarning, match="written halved"):
        lk.capture(ours).save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(given()), ours(given()), atol=1e-5, rtol=1e-5)
    back = lk.attach(made(), lk.Adapter.load(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(given()), ours(given()), atol=1e-6, rtol=1e-6)


def test_files_of_a_later_peft_are_taken_at_their_word(tmp_path):
    adapter = lk.capture(randomise(lk.attach(made(), config(targets=["attn"]))))
    adapter.save(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    for version, factor in ((None, 1), ("0.18.0", 1), ("0.21.3.dev0@abc", 1), ("0.22.0", 0.5), ("1.0", 0.5)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"peft_version": version}))
        found = lk.Adapter.load(tmp_path).updates["attn.out_proj"]
        assert torch.equal(found.B, factor * adapter.updates["attn.out_proj"].B)


def test_a_rank_of_its_own_and_a_dora_are_written_exactly_or_said(tmp_path):
    settings = {"targets": ["attn"], "packed": {"attn": [True, False, True]}, "rank_pattern": {"out_proj": 7}}
    model = randomise(lk.attach(made(), config(**settings)))
    lk.capture(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
    torch.testing.assert_close(theirs(given()), model(given()), atol=1e-5, rtol=1e-5)
    back = lk.attach(made(), lk.Adapter.load(tmp_path)).eval()
    torch.testing.assert_close(back(given()), model(given()), atol=1e-5, rtol=1e-5)
    dora = lk.capture(lk.attach(made(), config(targets=["attn"], variant="dora")))
    with pytest.raises(AdapterError, match=r"DoRA's magnitude of attn.*nn\.MultiheadAttention"):
        dora.save(tmp_path / "dora")


def test_an_output_without_its_attention_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    lk.capture(randomise(lk.attach(made(), config(targets=["attn"])))).save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if ".base_layer." in key}, file)
    with pytest.raises(AdapterError, match="output of an attention"):
        lk.Adapter.load(tmp_path)


# ---------------------------------------------------------------------------------- the base stays


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" not in n}


@pytest.fixture
def same_kernel():
    """Torch rounds differently in its fused kernel, and again where gradients of the weights are needed."""
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_the_base_is_not_written_to_and_a_fresh_adapter_changes_nothing(same_kernel):
    model = made().requires_grad_(False)
    before, y, picture = bits(model), model(given()), {n: id(p) for n, p in model.named_parameters()}
    version = model.attn.in_proj_weight._version
    lk.attach(model, config())
    assert torch.equal(model(given()), y)
    assert torch.equal(changed(model.attn, model.attn.lora_in_use()), before["attn.in_proj_weight"])
    with torch.enable_grad():
        randomise(model)(given()).sum().backward()
    assert model.attn.in_proj_weight._version == version
    assert isinstance(model.attn, nn.MultiheadAttention)
    assert isinstance(model.attn, MultiheadLayer)
    lk.activate(model, None)
    assert torch.equal(model(given()), y)
    lk.detach(model)
    assert all(torch.equal(before[n], p) and id(p) == picture[n] for n, p in model.named_parameters())
    assert type(model.attn) is nn.MultiheadAttention
    assert torch.equal(model(given()), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_computes_the_same_and_twenty_merges_leave_the_bits(dtype):
    model = made(dtype=dtype)
    before = bits(model)
    randomise(lk.attach(model, config()), size=0.2)
    y = model(given(dtype))
    for _ in range(20):
        lk.merge(model)
        assert not torch.equal(model.attn.in_proj_weight, before["attn.in_proj_weight"])
        found = model(given(dtype))
        lk.unmerge(model)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, y, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(before[n], p) for n, p in bits(model).items())


def test_saved_and_loaded_pickled_and_copied_it_is_the_same(tmp_path):
    model = randomise(lk.attach(made(), config(packed={"attn": [False, True, True]})))
    y = model(given())
    assert torch.equal(copy.deepcopy(model)(given()), y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(given()), y)
    state = copy.deepcopy(model.state_dict())
    other = lk.attach(made(), config(packed={"attn": [False, True, True]}))
    other.load_state_dict(state)
    assert torch.equal(other(given()), y)


# ---------------------------------------------------------------------------------- several, rows, kinds


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("grad", [True, False])
def test_rows_of_a_batch_have_it_each_for_itself(masks, batch_first, grad):
    model = made(batch_first, torch.float64)
    if not batch_first:
        model.head = nn.Identity()  # its rows are not the first axis of what comes before
    for seed, name in enumerate("ab"):
        randomise(lk.attach(model, config(targets="all-linear", rank=seed + 1), name=name), name, seed=seed)
    lk.activate(model, None)
    choices = ["b", None, {"a": 0.5, "b": -2.0}]
    x, settings = given(torch.float64), masks_of(masks, torch.float64)
    settings["need_weights"] = False  # which are summed over the batch
    wanted = []
    for n, choice in enumerate(choices):
        lk.activate(model, choice)
        own = dict(settings)
        if own.get("key_padding_mask") is not None:
            own["key_padding_mask"] = own["key_padding_mask"][n : n + 1]
        if own.get("attn_mask") is not None and own["attn_mask"].dim() == 3:
            own["attn_mask"] = own["attn_mask"][n * HEADS : (n + 1) * HEADS]
        wanted.append(model(x[n : n + 1], **own))
    with torch.set_grad_enabled(grad), lk.route(model, choices):
        found = model(x, **settings)
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-10, rtol=1e-10)


def test_attention_weights_of_rows_come_back_in_order():
    model = made().attn
    outer = nn.ModuleDict({"attn": model})
    for seed, name in enumerate("ab"):
        randomise(lk.attach(outer, config(targets=["attn"]), name=name), name, seed=seed)
    x, wanted = given(), []
    for n, choice in enumerate("aba"):
        lk.activate(outer, choice)
        wanted.append(model(x[n : n + 1], x[n : n + 1], x[n : n + 1])[1])
    with lk.route(outer, list("aba")):
        _, found = model(x, x, x)
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=1e-6)


def test_routing_checks_its_rows_and_refuses_choices_per_token():
    model = randomise(lk.attach(made(), config()))
    with pytest.raises(StateError, match="'attn' was given 3 rows"), lk.route(model, ["default"]):
        model(given())
    with pytest.raises(StateError, match="cannot be chosen per token"), lk.route(model, ["default"] * 15, per="token"):
        model(given())


@pytest.mark.parametrize("variant", ["dora", "loha", "lokr", "vera"])
def test_other_kinds_of_update_act_too(variant):
    model = lk.attach(made(dtype=torch.float64), config(variant=variant))
    changed = made(dtype=torch.float64)
    randomise(model)
    for name, update in lk.capture(model).updates.items():
        W = changed.get_submodule(name)
        W = W.in_proj_weight if isinstance(W, nn.MultiheadAttention) else W.weight
        with torch.no_grad():
            W += update.rows(tuple(W.shape), read=lambda W=W: [(slice(0, len(W)), W)])(slice(0, len(W)), W)
    x = given(torch.float64)
    torch.testing.assert_close(model(x), changed(x), atol=1e-10, rtol=1e-10)
    if variant == "dora":
        return  # whose norm has no gradient
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: model(x[:1, :2]), parameters)


def test_two_active_ones_add_up_and_dropout_is_of_training_alone():
    model = made(dtype=torch.float64)
    for seed, name in enumerate("ab"):
        randomise(lk.attach(model, config(dropout=0.5), name=name), name, seed=seed)
    lk.activate(model, {"a": 0.7, "b": -1.5})
    x, y = given(torch.float64), model(given(torch.float64))
    assert torch.equal(model(x), y)
    lk.merge(model)
    torch.testing.assert_close(model(x), y, atol=1e-10, rtol=1e-10)
    lk.unmerge(model)
    assert not torch.equal(model.train()(x), y)


# ---------------------------------------------------------------------------------- torch's transformers


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_does_not_take_its_fast_path_around_it(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 12, batch_first=batch_first, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    x = given()
    with torch.no_grad():
        before = model(x)
        randomise(lk.attach(model, config(targets="all-linear")), size=0.3)
        slow = model(x)
    with torch.enable_grad():
        torch.testing.assert_close(model(x), slow, atol=1e-5, rtol=1e-5)
    assert (slow - before).abs().max() > 1e-2
    lk.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_all_linear_and_attention_include_it_and_naming_it_adapts_both():
    for targets, wanted in (
        ("all-linear", {"attn", "attn.out_proj", "pool", "pool.out_proj", "head"}),
        ("attention", {"attn", "attn.out_proj", "pool", "pool.out_proj"}),
        (["pool"], {"pool", "pool.out_proj"}),
        (["pool.out_proj", "pool"], {"pool", "pool.out_proj"}),
    ):
        model = lk.attach(made(), config(targets=targets))
        assert set(lk.capture(model).updates) == wanted
    model = lk.attach(made(), config(exclude=["out_proj"]))
    assert set(lk.capture(model).updates) == {"attn", "pool"}
    summary = str(lk.summary(lk.attach(made(), config(targets="all-linear"))))
    assert "attn" in summary
    assert "in_proj_weight" not in summary


def test_what_cannot_be_adapted_is_refused_or_said():
    with pytest.raises(TargetError, match="name the attention, 'attn', which includes it"):
        lk.attach(made(), config(targets=["attn.out_proj"]))
    with pytest.raises(TargetError, match="name the attention"):
        lk.attach(made(), config(targets="all-linear", exclude=["attn"]))

    class Own(nn.MultiheadAttention):
        def forward(self, *inputs, **settings):
            return super().forward(*inputs, **settings)

    for attention, said in (
        (nn.MultiheadAttention(DIM, HEADS, kdim=6, vdim=DIM), "separate weights for q, k and v"),
        (Own(DIM, HEADS), "a forward of its own"),
    ):
        model = nn.ModuleDict({"attn": attention, "head": nn.Linear(DIM, 2)})
        with pytest.raises(TargetError, match=said):
            lk.attach(model, config(targets=["attn"]))
        with pytest.raises(TargetError, match=said):
            lk.attach(model, config(targets=["attn.out_proj"]))
        lk.attach(model, config(targets="all-linear"))
        assert set(lk.capture(model).updates) == {"head"}
        assert said in str(lk.summary(model).skipped["attn"])
        lk.detach(model)
    with pytest.raises(TargetError, match="'attn' has no row for each token: it is an attention"):
        lk.attach(made(), lk.LoraConfig(variant="tokens", targets=["attn"], trainable_tokens=[1]))


def test_merged_into_files_it_is_what_it_is_on_the_model(tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "base").mkdir()
    base = made()
    save_file(dict(base.state_dict()), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text('{"model_type": "plain"}')
    model = randomise(lk.attach(base, config()))
    lk.capture(model).save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", force=True)
    merged = made()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(merged(given()), model(given()), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_learns():
    model = lk.attach(made(), config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        loss = (model(given()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for _, p in itertools.islice(model.named_parameters(), 99) if p.requires_grad)
