"""What PEFT's folder held in other years and methods: MergedLinear of 0.2, DoRA, LoHa, LoKr; and what is refused, by
its name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lora import Factors
from lorakit.errors import AdapterError
from lorakit.formats import peft as ours

BLOOM = Path(__file__).parents[1] / "fixtures" / "peft_0.2_mergedlinear"
QKV = "transformer.h.{}.self_attention.query_key_value".format
pytestmark = pytest.mark.filterwarnings("ignore")


def merged_linear(x: Tensor, A: Tensor, B: Tensor, parts: list[bool], scale: float) -> Tensor:
    """The update of PEFT 0.2's MergedLinear: a grouped convolution, its result put at the enabled parts."""
    down = F.linear(x, A)
    up = F.conv1d(down.transpose(-2, -1), B, groups=sum(parts)).transpose(-2, -1)
    size = up.shape[-1] // sum(parts)
    full = x.new_zeros(*x.shape[:-1], len(parts), size)
    full[..., [i for i, p in enumerate(parts) if p], :] = up.unflatten(-1, (sum(parts), size))
    return scale * full.flatten(-2)


def test_a_mergedlinear_of_peft_0_2_gives_the_update_that_it_gave():
    adapter = lk.Adapter.load(BLOOM)
    raw = torch.load(BLOOM / "adapter_model.bin", weights_only=True)
    x = torch.randn(2, 5, 1024, dtype=torch.float64)
    assert set(adapter.factors) == {QKV(0), QKV(23)}
    for module, f in adapter.factors.items():
        A, B = (raw[f"base_model.model.{module}.lora_{h}.weight"].double() for h in "AB")
        assert (f.rank, f.alpha, f.scale, f.parts) == (8, 16, 2, (True, False, True))
        expected = merged_linear(x, A, B, [True, False, True], 2.0)
        torch.testing.assert_close(x @ f.delta().double().T, expected, atol=1e-6, rtol=1e-6)
        assert not f.delta()[1024:2048].any()
    assert adapter.config.packed == {"query_key_value": [True, False, True]}


def test_a_mergedlinear_attaches_and_is_written_as_what_todays_peft_reads(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention = nn.Module()
            self.self_attention.query_key_value = nn.Linear(1024, 3072)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.transformer = nn.Module()
            self.transformer.h = nn.ModuleDict({"0": Block(), "23": Block()})

        def forward(self, x: Tensor) -> Tensor:
            return sum(block.self_attention.query_key_value(x) for block in self.transformer.h.values())

    adapter, x = lk.Adapter.load(BLOOM), torch.randn(3, 1024)
    base = Model()(x)
    expected = base + sum(x @ f.delta().T for f in adapter.factors.values())
    torch.testing.assert_close(lk.attach(Model(), adapter).eval()(x), expected, atol=1e-4, rtol=1e-4)
    replace(adapter, config=adapter.config.replace(task=None)).save(tmp_path)  # this Model generates no text
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(Model(), tmp_path).eval()(x), expected, atol=1e-4, rtol=1e-4
    )
    again = lk.Adapter.load(tmp_path)
    for module, f in adapter.factors.items():
        g = again.factors[module]
        assert torch.equal(f.B, g.B)
        assert (f.parts, f.alpha, f.rank) == (g.parts, g.alpha, g.rank)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"enable_lora": [True, True, True]}, r"with enable_lora \[True, True, True\] and r 8, A \[24, in\]"),
        ({"enable_lora": [False]}, r"enable_lora is \[False\]; expected"),
        ({"enable_lora": "qv"}, "enable_lora is 'qv'"),
        ({"r": 4}, r"and r 4, A \[8, in\]"),
    ],
)
def test_a_mergedlinear_that_its_config_does_not_fit_is_refused(values, said, tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes((BLOOM / "adapter_model.bin").read_bytes())
    config = json.loads((BLOOM / "adapter_config.json").read_text()) | values
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(tmp_path)


DORA = {
    "llama": (tiny.llama, ["q_proj", "down_proj"], {}),
    "gpt2": (tiny.gpt2, ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    "embedding": (tiny.llama, ["embed_tokens", "v_proj"], {}),
    "convolutions": (lambda: tiny.cnn(dilation=1), ["conv1", "conv2", "head"], {}),  # PEFT merges no Conv3d
}


@pytest.mark.parametrize("case", DORA)
def test_a_dora_of_peft_is_read_exactly_and_written_as_peft_has_it(case, tmp_path):
    make, targets, more = DORA[case]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, use_dora=True, target_modules=targets, **more)
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = lk.Adapter.load(tmp_path / "theirs")
    merged = peft.PeftModel.from_pretrained(make(), tmp_path / "theirs").merge_and_unload()
    for module, f in adapter.factors.items():
        W = make().get_submodule(module).weight.double()
        across = f.transposed or f.kind == "embedding"
        V = (W.T if across else W).flatten(1) + f.scale * f.B.double().flatten(1) @ f.A.double().flatten(1)
        expected = adapter.updates[module].magnitude.double() * V / V.norm(dim=1, keepdim=True)
        expected = expected.T if across else expected.reshape(W.shape)
        torch.testing.assert_close(merged.get_submodule(module).weight.double(), expected, atol=2e-6, rtol=1e-5)
    adapter.save(tmp_path / "ours")
    first, second = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    for key, tensor in second.items():
        assert torch.equal(tensor, first[key]), key  # its shape too
    assert {k for k in first if "base_layer" not in k} == set(second)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(tiny.logits(again), tiny.logits(theirs), atol=2e-5, rtol=1e-5)


LYCORIS = {
    "loha": (
        tiny.mlp,
        peft.LoHaConfig(r=3, alpha=5, target_modules=["lin0", "lin1"], init_weights=False, rank_pattern={"lin1": 2}),
    ),
    "loha conv": (tiny.cnn, peft.LoHaConfig(r=3, alpha=5, target_modules=["conv2", "head"], init_weights=False)),
    "loha tucker": (
        tiny.cnn,
        peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1", "conv2"], init_weights=False, use_effective_conv2d=True),
    ),
    "lokr": (
        tiny.mlp,
        peft.LoKrConfig(r=2, alpha=5, target_modules=["lin0", "lin1"], init_weights=False, alpha_pattern={"lin0": 3}),
    ),
    "lokr of wholes": (tiny.mlp, peft.LoKrConfig(r=8, alpha=5, target_modules=["lin0", "lin1"], init_weights=False)),
    "lokr of products": (
        tiny.mlp,
        peft.LoKrConfig(
            r=1, alpha=5, target_modules=["lin0", "lin1"], init_weights=False, decompose_both=True, decompose_factor=5
        ),
    ),
    "lokr conv": (tiny.cnn, peft.LoKrConfig(r=1, alpha=5, target_modules=["conv2"], init_weights=False)),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_loha_and_lokr_of_peft_are_read_with_the_change_that_peft_makes(case, tmp_path):
    make, config = LYCORIS[case]
    torch.manual_seed(2)
    theirs = peft.get_peft_model(make(), config)
    theirs.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    assert set(adapter.updates) == set(config.target_modules)
    for module, update in adapter.updates.items():
        weight = make().get_submodule(module).weight
        expected = theirs.base_model.model.get_submodule(module).get_delta_weight("default").detach()
        torch.testing.assert_close(update.delta(tuple(weight.shape)), expected, atol=1e-6, rtol=1e-5)
        assert expected.abs().max() > 1e-3


@pytest.mark.parametrize(
    "config, said",
    [
        (peft.HRAConfig(target_modules=["lin0"], r=2), r"'HRA'.*\n  HRA reflects weights: merge it"),
        (peft.OFTConfig(target_modules=["lin0"], r=2, oft_block_size=0), r"'OFT'.*\n  OFT rotates weights: merge it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_methods_are_refused_by_name_with_what_to_do(config, said, tmp_path):
    peft.get_peft_model(tiny.mlp(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(tmp_path)


@pytest.mark.parametrize("config", [peft.CPTConfig, peft.MultitaskPromptTuningConfig])
def test_prompt_methods_are_refused_since_no_lora_does_the_same(config, tmp_path):
    config(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="adds inputs and changes no weight"):
        lk.Adapter.load(tmp_path)


def test_what_pefts_format_cannot_hold_is_listed_and_not_written(tmp_path):
    ones = torch.ones(2, 2)
    plain = Factors(ones, ones, 2.0)
    across = Dora(plain, torch.ones(1, 2))
    adapter = Adapter(
        lk.LoraConfig(rank=2),
        {"a": plain, "b": across, "x": Loha(ones, ones, ones, ones, 1.0)},
        embeddings={"<s>": ones},
    )
    lost = "\n".join(ours.losses(adapter))
    for said in ("another kind (x)", "embeddings (<s>)", "all modules are DoRA or none", "this one for each input"):
        assert said in lost
    with pytest.raises(AdapterError, match="cannot hold all"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_of_both_scaling_rules_keep_their_scale_in_one_folder(tmp_path):
    A, B = torch.randn(4, 10), torch.randn(20, 4)
    for rslora in (False, True):
        made = {"lin0": Factors(A, B, 6.0, rslora=True), "lin1": Factors(torch.randn(4, 20), torch.randn(12, 4), 6.0)}
        Adapter(lk.LoraConfig(rank=4, alpha=6, rslora=rslora), made).save(tmp_path)
        again = lk.Adapter.load(tmp_path)
        assert {m: f.scale for m, f in again.factors.items()} == {"lin0": 3.0, "lin1": 1.5}


@pytest.mark.parametrize(
    "shape, said",
    [
        ((3,), r"lora_magnitude_vector \[3\], which does not fit its 20 outputs"),
        ((1, 20), r"\[1, 20\], which does not"),
    ],
)
def test_a_magnitude_of_another_shape_is_refused(shape, said, tmp_path):
    from lorakit.io.tensors import write_tensors

    f = Dora(Factors(torch.randn(4, 10), torch.randn(20, 4), 6.0), torch.ones(20, 1))
    Adapter(lk.LoraConfig(rank=4, alpha=6), {"lin0": f}).save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    write_tensors(
        tmp_path / "adapter_model.safetensors",
        tensors | {"base_model.model.lin0.lora_magnitude_vector": torch.ones(shape)},
    )
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "PiSSA"])
def test_a_start_that_changed_the_base_is_refused_as_its_factors_are_another_update(tmp_path, start):
    lk.Adapter(
        lk.LoraConfig(rank=1, targets=["lin0"]), {"lin0": lk.Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    ).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        lk.Adapter.load(tmp_path)
    for harmless in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": harmless}))
        assert lk.Adapter.load(tmp_path).factors
