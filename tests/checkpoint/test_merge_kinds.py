"""Merging what is not plain LoRA: DoRA, LoHa, LoKr and whole updates, against PEFT's own merge and float64."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, TargetError

CONFIG = lk.LoraConfig(rank=2, alpha=4, targets=["x"])
MADE = torch.Generator()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=MADE)


@pytest.fixture(autouse=True)
def seeded():
    MADE.manual_seed(0)


def on_disk(model: nn.Module, folder):
    """Any model's weights as a folder; its config says nothing but that it is there."""
    folder.mkdir()
    save_file(
        {n: p.detach().contiguous() for n, p in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text('{"model_type": "plain"}')
    return folder


DORAS = {
    "linear": (tiny.mlp, {"target_modules": ["lin0", "lin1"]}),
    "embedding": (tiny.embedder, {"target_modules": ["emb", "head"]}),
    "conv": (tiny.cnn, {"target_modules": ["conv1", "conv2_circular", "head"]}),
    "rslora, mixed ranks": (
        tiny.mlp,
        {"target_modules": ["lin0", "lin1"], "use_rslora": True, "rank_pattern": {"lin1": 3}},
    ),
}


@pytest.mark.parametrize("kind", DORAS)
def test_a_dora_merges_as_peft_merges_it(kind, tmp_path):
    make, options = DORAS[kind]
    model = make()
    base = on_disk(model, tmp_path / "base")
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, init_lora_weights=False, **options)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * random(*parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)
    assert sum(not before[n].equal(after[n]) for n in after) == len(lk.Adapter.load(tmp_path / "adapter").factors)


def test_a_dora_of_gpt2_keeps_its_outputs_in_the_stored_columns(tmp_path):
    model = tiny.gpt2()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, use_dora=True, init_lora_weights=False, fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"]
    )
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)


def test_a_magnitude_of_each_input_is_the_norm_of_each_column(tmp_path):
    base = on_disk(tiny.mlp(), tmp_path / "base")
    f = Factors(random(2, 10), random(20, 2), 4)
    magnitude = random(1, 10).abs() + 0.5
    merge_checkpoint(base, lk.Adapter(CONFIG, {"lin0": Dora(f, magnitude)}), tmp_path / "out")
    W = load_file(base / "model.safetensors")["lin0.weight"].double() + 2 * f.B.double() @ f.A.double()
    expected = W * (magnitude.double() / W.norm(dim=0, keepdim=True))
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors")["lin0.weight"].double(), expected, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr decomposed"])
def test_loha_and_lokr_merge_as_peft_merges_them(kind, tmp_path):
    model = tiny.cnn()
    base = on_disk(model, tmp_path / "base")
    targets = {"target_modules": ["conv2_circular", "head"], "init_weights": False}
    config = (
        peft.LoHaConfig(r=2, alpha=4, **targets)
        if kind == "loha"
        else peft.LoKrConfig(r=1, alpha=4, decompose_both="dec" in kind, **targets)
    )
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert len(report.targets) == 2
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)


def test_every_kind_changes_its_weight_by_its_delta_in_every_block(tmp_path, monkeypatch):
    import lorakit.io.stream as stream

    monkeypatch.setattr(stream, "BLOCK", 30)  # a few rows at a time
    base = on_disk(tiny.mlp(), tmp_path / "base")
    others = {
        "lin0": Loha(random(20, 2), random(2, 10), random(20, 2), random(2, 10), 3.0),
        "lin1": Lokr(2.0, w1=random(3, 4), w2=random(4, 5)),
        "head": Dense(random(4, 12)),
        "norm": Dense(random(12), bias=random(12)),
    }
    merge_checkpoint(base, lk.Adapter(CONFIG, others), tmp_path / "out", weights=[0.5])
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for module, update in others.items():
        torch.testing.assert_close(
            after[f"{module}.weight"] - before[f"{module}.weight"], 0.5 * update.delta(), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(after["norm.bias"] - before["norm.bias"], 0.5 * others["norm"].bias, atol=1e-6, rtol=0)
    assert after["lin0.bias"].equal(before["lin0.bias"])


def test_an_untrained_lokr_or_loha_is_said_to_be_one(tmp_path):
    base = on_disk(tiny.mlp(), tmp_path / "base")
    for zero in (
        Lokr(1.0, w1=random(2, 2), w2=torch.zeros(10, 5)),
        Loha(random(20, 2), random(2, 10), torch.zeros(20, 2), random(2, 10), 1.0),
    ):
        with pytest.raises(AdapterError, match="saved before training"):
            merge_checkpoint(base, lk.Adapter(CONFIG, {"lin0": zero}), tmp_path / "out")


def test_a_bias_that_the_base_lacks_and_other_sizes_are_refused(tmp_path):
    base = on_disk(tiny.mlp(), tmp_path / "base")
    with pytest.raises(TargetError, match="bias of 'head', which has none"):
        merge_checkpoint(base, lk.Adapter(CONFIG, {"head": Dense(None, bias=random(4))}), tmp_path / "out")
    for wrong in (Dense(random(4, 11)), Loha(random(5, 2), random(2, 12), random(5, 2), random(2, 12), 1.0)):
        with pytest.raises(AdapterError, match=r"'head' has a weight of \[4, 12\]"):
            merge_checkpoint(base, lk.Adapter(CONFIG, {"head": wrong}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dora_with_one_output_keeps_the_norm_of_its_row(tmp_path):
    torch.manual_seed(0)
    base = on_disk(nn.Sequential(nn.Linear(3, 1)), tmp_path / "base")
    f = Dora(Factors(random(1, 3), random(1, 1), 1.0), torch.tensor([[2.0]]))
    merge_checkpoint(base, lk.Adapter(CONFIG, {"0": f}), tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")["0.weight"].norm(), torch.tensor(2.0))


def test_a_row_of_zeros_stays_one_under_dora(tmp_path):
    model = tiny.mlp()
    with torch.no_grad():
        model.lin0.weight[3] = 0
    base = on_disk(model, tmp_path / "base")
    B = random(20, 2)
    B[3] = 0
    dora = Dora(Factors(random(2, 10), B, 4), torch.ones(20, 1))
    merge_checkpoint(base, lk.Adapter(CONFIG, {"lin0": dora}), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["lin0.weight"]
    assert not written[3].any()
    torch.testing.assert_close(written[4].norm(), torch.tensor(1.0))
