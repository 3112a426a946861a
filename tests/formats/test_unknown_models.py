"""Files of models that lorakit does not know: read, inspected, changed and written back under the names that they have;
and files told by names and by widths.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit import formats
from lorakit.errors import AdapterError, ConfigError

W = 64
SPELLINGS = {
    "comfyui": ("diffusion_model.blocks.{i}.mystery.q", "lora_A.weight", "lora_B.weight"),
    "comfyui, kohya's suffixes": ("diffusion_model.blocks.{i}.mystery.q", "lora_down.weight", "lora_up.weight"),
    "bare": ("strange_blocks.{i}.attn.q", "lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_unet_strange_blocks_{i}_attn_q", "lora_down.weight", "lora_up.weight"),
    "lycoris": ("lycoris_strange_blocks_{i}_attn_q", "lora_down.weight", "lora_up.weight"),
    "diffsynth": ("pipe.dit.strange.{i}.q", "lora_A.weight", "lora_B.weight"),
    "a component": ("transformer.strange_blocks.{i}.q", "lora_A.weight", "lora_B.weight"),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def write(path, spelling: str, alpha: float | None = None):
    torch.manual_seed(0)
    name, down, up = SPELLINGS[spelling]
    tensors = {}
    for i in range(2):
        tensors |= {f"{name.format(i=i)}.{down}": random(4, W), f"{name.format(i=i)}.{up}": random(W, 4)}
        if alpha is not None:
            tensors[f"{name.format(i=i)}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_of_an_unknown_model_is_edited_resized_and_combined_under_its_own_keys(
    spelling, alpha, tmp_path, lorakit
):
    source = tmp_path / "f.safetensors"
    tensors = write(source, spelling, alpha)
    stems = {re.sub(r"\.(lora_.*|alpha)$", "", key) for key in tensors}
    adapter = lk.Adapter.load(source)
    assert set(adapter.updates) == stems
    scale = 1.0 if alpha is None else alpha / 4
    _, down, up = SPELLINGS[spelling]
    for stem in stems:
        expected = scale * tensors[f"{stem}.{up}"] @ tensors[f"{stem}.{down}"]
        torch.testing.assert_close(adapter.updates[stem].delta(), expected)
    calls = {
        "edit": (["edit", source, "OUT", "--scale", "0.5"], 0.5),
        "resize": (["resize", source, "OUT", "--rank", "4"], 1.0),
        "combine": (["combine", source, source, "--out", "OUT"], 2.0),
    }
    for name, (call, factor) in calls.items():
        out = tmp_path / f"{name}.safetensors"
        code, _, err = lorakit(*[str(out) if word == "OUT" else str(word) for word in call])
        assert code == 0, err
        written = load_file(out)
        alphas = {f"{stem}.alpha" for stem in stems}
        # diffusers' own spelling has its alphas in the header
        assert written.keys() == (tensors.keys() - alphas if spelling == "a component" else tensors.keys())
        again = lk.Adapter.load(out)
        for stem in stems:
            torch.testing.assert_close(again.updates[stem].delta(), factor * adapter.updates[stem].delta())
    assert lorakit("inspect", str(source), "--json")[0] == 0


def test_lokr_loha_and_whole_changes_of_an_unknown_model_are_written_back(tmp_path):
    m = "diffusion_model.blocks.0.mystery"
    tensors = {
        f"{m}.q.lokr_w1": random(8, 8),
        f"{m}.q.lokr_w2": random(8, 8),
        f"{m}.q.alpha": torch.tensor(1.0),
        f"{m}.k.hada_w1_a": random(W, 2),
        f"{m}.k.hada_w1_b": random(2, W),
        f"{m}.k.hada_w2_a": random(W, 2),
        f"{m}.k.hada_w2_b": random(2, W),
        f"{m}.k.alpha": torch.tensor(1.0),
        f"{m}.norm_q.diff": random(W),
        f"{m}.modulation.diff": random(1, 6, W),
        f"{m}.o.lora_A.weight": random(4, W),
        f"{m}.o.lora_B.weight": random(W, 4),
        f"{m}.o.diff_b": random(W),
    }
    save_file(tensors, tmp_path / "f.safetensors")
    adapter = lk.Adapter.load(tmp_path / "f.safetensors")
    for path in (
        formats.save_as_read(adapter, tmp_path / "g.safetensors", "diffusers"),
        adapter.save(tmp_path / "h.safetensors", "diffusers"),
        adapter.save(tmp_path / "i.safetensors", "comfyui"),
    ):
        written = load_file(path)
        assert written.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(written[key], tensor), key


def test_known_names_beside_unknown_ones_keep_the_files_names(tmp_path):
    """Wan's names, and a parameter of its blocks that is no module."""
    m = "diffusion_model.blocks.0.self_attn"
    tensors = {f"{m}.q.lora_A.weight": random(4, W), f"{m}.q.lora_B.weight": random(W, 4)}
    tensors |= {f"{m}.norm_q.diff": random(W), "diffusion_model.blocks.0.modulation.diff": random(1, 6, W)}
    save_file(tensors, tmp_path / "f.safetensors")
    adapter = lk.Adapter.load(tmp_path / "f.safetensors")
    written = load_file(formats.save_as_read(adapter, tmp_path / "g.safetensors", "diffusers"))
    assert written.keys() == tensors.keys()


def flux(width: int, up: int, rest: tuple[str, ...] = ("img_attn.qkv",)) -> dict[str, torch.Tensor]:
    """A block's feed-forward that is `up` widths wide inside, and its attention."""
    sizes = {"img_attn.qkv": (3 * width, width), "img_mlp.0": (up * width, width)}
    sizes["img_mlp.2"] = (width, up // 2 * width if up == 6 else up * width)
    found = {}
    for name in ("img_mlp.0", "img_mlp.2", *rest):
        out, inputs = sizes[name]
        found |= {
            f"diffusion_model.double_blocks.0.{name}.lora_A.weight": random(2, inputs),
            f"diffusion_model.double_blocks.0.{name}.lora_B.weight": random(out, 2),
        }
    return found


@pytest.mark.parametrize("width", [16, 64, 3072, 6144])
@pytest.mark.parametrize("up, model, module", [(4, "flux", "ff.net.0.proj"), (6, "flux2", "ff.linear_in")])
@pytest.mark.parametrize("flat", [False, True])
def test_flux_and_flux2_are_told_apart_by_their_proportions(width, up, model, module, flat, tmp_path):
    tensors = flux(width, up)
    if flat:
        tensors = {
            "lora_unet_" + k[16:].rsplit(".lora", 1)[0].replace(".", "_") + "." + _kohya(k): t
            for k, t in tensors.items()
        }
    save_file(tensors, tmp_path / "f.safetensors")
    adapter = lk.Adapter.load(tmp_path / "f.safetensors")
    assert adapter.metadata["model"] == model
    assert f"transformer.transformer_blocks.0.{module}" in adapter.updates


def _kohya(key: str) -> str:
    return "lora_down.weight" if "lora_A" in key else "lora_up.weight"


def test_widths_of_no_known_model_are_refused_unless_the_model_is_said(tmp_path, lorakit):
    source = tmp_path / "f.safetensors"
    tensors = {
        "diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight": random(2, W),
        "diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight": random(5 * W, 2),
    }
    save_file(tensors, source)
    with pytest.raises(
        AdapterError, match=r"(?s)320 outputs and 64 inputs, in flux it has 12288 and 3072.*--model-type"
    ):
        lk.Adapter.load(source)
    assert lorakit("inspect", str(source))[0] == 1
    assert list(lk.Adapter.load(source, model_type="flux").updates) == [
        "transformer.transformer_blocks.0.ff.net.0.proj"
    ]
    own = lk.Adapter.load(source, model_type="other")
    assert list(own.updates) == ["diffusion_model.double_blocks.0.img_mlp.0"]
    code, _, err = lorakit(
        "edit", str(source), str(tmp_path / "g.safetensors"), "--scale", "2", "--model-type", "other"
    )
    assert code == 0, err
    assert load_file(tmp_path / "g.safetensors").keys() == tensors.keys()
    with pytest.raises(ConfigError, match="did you mean 'flux'"):
        lk.Adapter.load(source, model_type="flx")


def test_text_encoders_beside_a_dit_in_every_spelling_are_one_adapter(tmp_path):
    """PEFT's denoiser with kohya's text encoder, and ComfyUI's names of both."""
    pair = {"lora_A.weight": random(2, 3072), "lora_B.weight": random(3072, 2)}
    clip = {"lora_down.weight": random(2, 768), "lora_up.weight": random(3072, 2)}
    layer = "text_model.encoder.layers.0.mlp.fc1"
    modules = {
        "transformer.transformer_blocks.0.attn.to_out.0": "diffusion_model.double_blocks.0.img_attn.proj",
        f"text_encoder.{layer}": f"text_encoders.clip_l.transformer.{layer}",
    }
    native, clip_l = modules.values()
    mixed = {f"transformer.transformer_blocks.0.attn.to_out.0.{s}": t for s, t in pair.items()}
    mixed |= {f"lora_te1_{layer.replace('.', '_')}.{s}": t for s, t in clip.items()}
    comfy = {f"{native}.{s}": t for s, t in pair.items()}
    comfy |= {f"{clip_l}.{s}": t for s, t in clip.items()}
    alone = {key: t for key, t in comfy.items() if key.startswith("text_encoders.")}
    save_file(alone, tmp_path / "te.safetensors")
    assert list(lk.Adapter.load(tmp_path / "te.safetensors").updates) == [f"text_encoder.{layer}"]
    for tensors in (mixed, comfy):
        save_file(tensors, tmp_path / "f.safetensors")
        adapter = lk.Adapter.load(tmp_path / "f.safetensors")
        assert set(adapter.updates) == set(modules)
        torch.testing.assert_close(
            adapter.updates[f"text_encoder.{layer}"].delta(), clip["lora_up.weight"] @ clip["lora_down.weight"]
        )
        written = load_file(formats.save_as_read(adapter, tmp_path / "g.safetensors", "diffusers"))
        assert {re.sub(r"\.(lora_.*|alpha)$", "", k) for k in written} == {
            re.sub(r"\.(lora_.*|alpha)$", "", k) for k in tensors
        }


def test_the_alphas_in_diffusers_header_count_for_bare_names_too(tmp_path):
    """`save_lora_adapter` of one transformer: no component, the alphas in the header."""
    name = "layers.0.attention.to_q"
    save_file(
        {f"{name}.lora_A.weight": random(2, 3840), f"{name}.lora_B.weight": random(3840, 2)},
        tmp_path / "f.safetensors",
        {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})},
    )
    adapter = lk.Adapter.load(tmp_path / "f.safetensors")
    assert {m: f.scale for m, f in adapter.factors.items()} == {f"transformer.{name}": 4.0}
