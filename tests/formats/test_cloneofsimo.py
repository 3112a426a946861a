"""cloneofsimo's numbered files: real ones, the order against the real classes, and what is written."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import diffusers as hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import lorakit as lk
from lorakit import formats
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError
from lorakit.formats import cloneofsimo, losses
from lorakit.formats.convert import convert

REAL = Path(__file__).parents[1] / "fixtures" / "cloneofsimo_sd"
DISNEY = REAL / "lora_disney.safetensors"


@pytest.fixture(scope="module")
def sd1() -> dict[str, nn.Module]:
    """The real classes in the real sizes, without memory."""
    with torch.device("meta"):
        config = CLIPTextConfig(num_hidden_layers=12, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        return {"unet": hub.UNet2DConditionModel(cross_attention_dim=768), "text_encoder": CLIPTextModel(config)}


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def exact(f: lk.Factors) -> torch.Tensor:
    return f.scale * f.B.double() @ f.A.double()


def test_every_pair_of_a_real_file_has_the_shape_of_its_module_in_the_real_model(sd1):
    adapter = lk.Adapter.load(DISNEY)
    sizes = {
        f"{component}.{'text_model.' * name.startswith('encoder.')}{name}": tuple(module.weight.shape)
        for component, model in sd1.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    fit = [module for module, f in adapter.factors.items() if sizes[module] == (f.B.shape[0], f.A.shape[1])]
    assert sum(m.startswith("unet.") for m in fit) == 144
    assert sum(m.startswith("text_encoder.") for m in fit) == 48
    assert len(adapter.factors) == 192
    assert {f.scale for f in adapter.factors.values()} == {1.0}
    tensors = load_file(DISNEY)
    for token in ("<s1>", "<s2>"):
        assert torch.equal(adapter.embeddings[token], tensors[token])


def test_numbers_mean_the_modules_in_the_order_in_which_the_classes_make_them(sd1):
    # Square matrices all: a wrong order of the text encoder would go unseen by shapes. The class itself says it.
    names = [
        name
        for name, module in sd1["text_encoder"].named_modules()
        if isinstance(module, nn.Linear) and "self_attn" in name
    ]
    assert [f"text_model.{name}" for name in names] == cloneofsimo.text_order(12)
    tensors, adapter = load_file(DISNEY), lk.Adapter.load(DISNEY)
    for number, module in (
        (0, "layers.0.self_attn.k_proj"),
        (2, "layers.0.self_attn.q_proj"),
        (47, "layers.11.self_attn.out_proj"),
    ):
        assert torch.equal(
            adapter.factors[f"text_encoder.text_model.encoder.{module}"].B, tensors[f"text_encoder:{number}:up"]
        )
    for number, module in (
        (4, "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"),
        (5, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"),
        (54, "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        (135, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        (143, "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"),
    ):
        assert torch.equal(adapter.factors[f"unet.{module}"].A, tensors[f"unet:{number}:down"])


def test_a_real_file_is_written_back_tensor_for_tensor(tmp_path):
    adapter = lk.Adapter.load(DISNEY)
    path = adapter.save(tmp_path / "x.safetensors", "cloneofsimo")
    theirs, ours = load_file(DISNEY), load_file(path)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    before, after = header_of(DISNEY), header_of(path)
    assert {k: v for k, v in after.items() if k not in ("unet", "text_encoder")} == {
        k: v for k, v in before.items() if k not in ("unet", "text_encoder")
    }
    assert set(json.loads(after["unet"])) == set(json.loads(before["unet"]))
    assert json.loads(after["text_encoder"]) == json.loads(before["text_encoder"])


def test_pickled_lists_and_tokens_are_read(tmp_path):
    path = REAL / "lora_kiriko2.text_encoder.pt"
    stored = torch.load(path, "cpu", weights_only=True)  # it was pickled on a GPU
    adapter = lk.Adapter.load(path)
    assert len(adapter.factors) == 48
    assert torch.equal(adapter.factors["text_encoder.text_model.encoder.layers.0.self_attn.v_proj"].B, stored[2])
    assert torch.equal(adapter.factors["text_encoder.text_model.encoder.layers.0.self_attn.v_proj"].A, stored[3])
    tokens = lk.Adapter.load(REAL / "lora_kiriko2.ti.pt").embeddings
    assert {token: tuple(t.shape) for token, t in tokens.items()} == {"<krk>": (768,)}


def test_three_pickles_of_one_name_are_one_adapter_and_stale_ones_go(tmp_path):
    adapter = lk.Adapter.load(DISNEY)
    path = adapter.save(tmp_path / "x.pt", "cloneofsimo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt", "x.text_encoder.pt", "x.ti.pt"]
    assert formats.format_of(path) == "cloneofsimo"
    again = lk.Adapter.load(path)
    assert again.factors.keys() == adapter.factors.keys()
    assert all(torch.equal(exact(again.factors[m]), exact(f)) for m, f in adapter.factors.items())
    assert all(torch.equal(again.embeddings[t], v) for t, v in adapter.embeddings.items())
    unet = {m: f for m, f in adapter.factors.items() if m.startswith("unet.")}
    replace(adapter, updates=unet, embeddings={}).save(path, "cloneofsimo")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert lk.Adapter.load(path).factors.keys() == unet.keys()


def sd_adapter(wanted, text: int = 768, dtype=torch.float32) -> lk.Adapter:
    from lorakit.formats import names

    model, made, factors = ("sd1" if text == 768 else "sd2"), torch.Generator().manual_seed(0), {}
    for module in (
        *(f"unet.{n}" for n in cloneofsimo.UNET_ORDERS[0]),
        *(f"text_encoder.{n}" for n in cloneofsimo.text_order(12)),
    ):
        if wanted(module):
            out, size = names.shapes(model)[module]
            rank, alpha = ((1, 3.0), (2, 0.3), (2, 2.0))[len(factors) % 3]
            A, B = torch.randn(rank, size, generator=made), torch.randn(out, rank, generator=made)
            factors[module] = lk.Factors(A.to(dtype), B.to(dtype), alpha)
    return lk.Adapter(lk.LoraConfig(), factors)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_module_keeps_its_change_when_its_strength_goes_into_its_up(suffix, dtype, tmp_path):
    adapter = sd_adapter(lambda m: "mid_block" in m or "layers.1." in m, dtype=dtype)
    again = lk.Adapter.load(adapter.save(tmp_path / f"x{suffix}", "cloneofsimo"))
    assert again.factors.keys() == adapter.factors.keys()
    for module, f in adapter.factors.items():
        assert again.factors[module].scale == 1
        torch.testing.assert_close(exact(again.factors[module]), exact(f), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text, layers", [(768, 12), (1024, 23)])
def test_modules_that_the_adapter_lacks_are_zeros_of_the_models_own_shapes(text, layers, tmp_path):
    adapter = sd_adapter(lambda m: m.endswith(("attn2.to_k", "layers.0.self_attn.q_proj")), text)
    tensors = load_file(adapter.save(tmp_path / "x.safetensors", "cloneofsimo"))
    assert tuple(tensors["unet:9:up"].shape) == (320, 1)
    assert tuple(tensors["unet:5:down"].shape) == (1, text)
    assert not tensors["unet:9:down"].any()
    assert sum(key.startswith("unet:") for key in tensors) == 256  # attentions alone, as the oldest files
    assert sum(key.startswith("text_encoder:") for key in tensors) == 8 * layers
    assert lk.Adapter.load(tmp_path / "x.safetensors").factors.keys() == adapter.factors.keys()


def test_a_file_of_the_later_module_order_is_told_by_its_shapes(tmp_path):
    adapter = sd_adapter(lambda m: m.startswith("unet."))
    order = [f"unet.{n}" for n in cloneofsimo.UNET_ORDERS[1]]
    listed = [
        t
        for m in order
        for t in (
            exact(adapter.factors[m]) @ torch.eye(adapter.factors[m].A.shape[1], 1).double(),
            adapter.factors[m].A[:1].double(),
        )
    ]
    torch.save(listed, tmp_path / "x.pt")
    again = lk.Adapter.load(tmp_path / "x.pt")
    assert all(torch.equal(again.factors[m].B, listed[2 * i]) for i, m in enumerate(order))


def changed(**changes) -> dict[str, torch.Tensor]:
    tensors = load_file(DISNEY)
    for key, value in changes.items():
        name = key.replace("_at_", ":").replace("__", ":")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"unet_at_80__up": None}, "'unet:80:up' is missing"),
        (
            {"unet_at_4__up": torch.ones(320, 1)},
            "'unet:4' has up [320, 1] and down [1, 320], which is not the shape of down_blocks.0",
        ),
        ({"unet_at_4__up": torch.ones(2560, 2)}, "'unet:4:down' has shape [1, 320]"),
        (
            {"unet_at_4__up": torch.ones(2560, 1, 1, 1), "unet_at_4__down": torch.ones(1, 320, 3, 3)},
            "convolutions, from an extended injection",
        ),
        ({"unet_at_4__up": torch.ones(2560, 1, dtype=torch.int64)}, "dtype torch.int64"),
        ({"unet_at_4__up": torch.full((2560, 1), float("inf"))}, "not finite"),
        ({"unet_at_999999__up": torch.ones(2560, 1)}, "is missing; 145 modules are numbered from 0"),
        (
            {"text_encoder_at_47__up": None, "text_encoder_at_47__down": None},
            "47 modules numbered as text_encoder; expected four for each layer",
        ),
        (
            {"<s1>": torch.ones(768).to(torch.float8_e4m3fn)},
            "token '<s1>' has shape [768] and dtype torch.float8_e4m3fn",
        ),
        ({"other": torch.ones(3)}, "key 'other' is not in this format"),
    ],
)
def test_a_damaged_file_is_refused_with_the_key_at_fault(changes, said, tmp_path):
    save_file(changed(**changes), tmp_path / "x.safetensors", header_of(DISNEY))
    with pytest.raises(AdapterError, match=r"x\.safetensors") as caught:
        lk.Adapter.load(tmp_path / "x.safetensors")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "value, said",
    [
        ([torch.ones(3, 1)], "holds 1 tensors; expected a list of pairs"),
        ([torch.ones(3, 1), torch.ones(1, 4)] * 5, "5 modules numbered as text_encoder"),
        (
            [torch.ones(3, 1), torch.ones(1, 4), torch.ones(3, 1), torch.ones(1, 3)],
            "2 modules numbered as unet; expected 144, or 128",
        ),
        ([torch.ones(3, 1), "x"], "holds a list"),
        (
            [torch.ones(1).expand(1 << 30, 1), torch.ones(1, 4)],
            "'[0]' is not a plain tensor whose elements are all in the file",
        ),
    ],
)
def test_a_pickled_list_that_is_no_adapter_is_refused(value, said, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match=r"x\.pt") as caught:
        lk.Adapter.load(tmp_path / "x.pt")
    assert said in str(caught.value)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_pickled_list_is_executed(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if legacy:
        (tmp_path / "x.pt").write_bytes(pickle.dumps([Payload()], protocol=2))
    else:
        torch.save([torch.ones(2, 1), Payload()], tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="never runs code"):
        lk.Adapter.load(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_what_it_cannot_hold_is_listed_and_not_written(tmp_path):
    adapter = sd_adapter(lambda m: m.endswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"))
    (module,) = adapter.factors
    f = adapter.factors[module]
    more = {
        module: Dora(f, torch.ones(1280, 1)),
        "unet.conv_in": lk.Factors(torch.ones(1, 4, 3, 3), torch.ones(320, 1, 1, 1), 1.0, "conv"),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": lk.Factors(torch.ones(1, 768), torch.ones(3072, 1), 1.0),
        "unet.conv_out": Dense(torch.ones(2, 2)),
    }
    full = lk.Adapter(lk.LoraConfig(), more, saved={"unet.conv_in.bias": torch.ones(2)})
    lines = cloneofsimo.losses(full)
    for said in ("no place for 2 modules", "no DoRA magnitudes", "low-rank factors only", "no saved weights"):
        assert sum(said in line for line in lines) == 1, said
    with pytest.raises(AdapterError, match="cannot hold all of this adapter"):
        full.save(tmp_path / "x.safetensors", "cloneofsimo")
    other_width = lk.Adapter(lk.LoraConfig(), {module: lk.Factors(torch.ones(1, 8), torch.ones(8, 1), 1.0)})
    assert "neither SD1 nor SD2" in cloneofsimo.losses(other_width)[0]
    text_alone = sd_adapter(lambda m: m.startswith("text_encoder."))
    with pytest.raises(AdapterError, match=r"its \.pt starts with the UNet's modules.*a \.safetensors does not need"):
        text_alone.save(tmp_path / "x.pt", "cloneofsimo")
    assert any("its .pt starts" in line for line in losses(text_alone, "cloneofsimo", tmp_path / "x.pt"))
    assert losses(text_alone, "cloneofsimo") == losses(text_alone, "cloneofsimo", tmp_path / "x.safetensors") == []
    assert not list(tmp_path.iterdir())
    assert cloneofsimo.losses(adapter) == []


def test_allowing_losses_does_not_help_where_the_ending_is_the_trouble(tmp_path):
    text_alone = sd_adapter(lambda m: m.startswith("text_encoder."))
    for allow in (False, True):
        with pytest.raises(AdapterError, match=r"its \.pt starts with the UNet's modules") as caught:
            convert(text_alone, tmp_path / "x.pt", "cloneofsimo", allow_loss=allow)
        assert "--allow-loss" not in str(caught.value)
    assert convert(text_alone, tmp_path / "x.safetensors", "cloneofsimo").lost == []
