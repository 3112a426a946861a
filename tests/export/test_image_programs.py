"""Export for ComfyUI, A1111 and diffusers: every key of the file is one that the program finds, or it is refused."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import AdapterError, ConfigError
from lorakit.export import export, image_programs
from lorakit.formats import names

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "flux2", "qwen_image", "z_image", "wan", "chroma", "hunyuan_video")
# program -> the families that it is refused for
REFUSED = {"comfyui": (), "a1111": FAMILIES[4:], "diffusers": ()}
ATTENTION = re.compile(r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$")


def modules_of(model: str, component: str) -> dict[str, tuple[int, ...]]:
    """Full name -> shape at a 64th of the width, of the matrices and kernels in a component's first two blocks."""
    listed = names.module_list(names.PIPELINES[model][component].listed)["modules"]
    first = {n: s for n, s in listed.items() if len(s) > 1 and not re.search(r"\.([2-9]|\d\d+)\.(?!linear)", n)}
    narrow = {n: (max(s[0] // 64, 1), max(s[1] // 64, 1), *s[2:]) for n, s in first.items()}
    return {f"{component}.{n}": s for n, s in narrow.items() if component != "text_encoder" or "layers" in n}


def adapter(model: str, *components: str, only: re.Pattern[str] = ATTENTION, **metadata) -> lk.Adapter:
    """Random factors of rank 1 for modules of these components."""
    made, updates = torch.Generator().manual_seed(0), {}
    for component in components:
        for name, shape in modules_of(model, component).items():
            if component.startswith("text_encoder") or only.search(name):
                A = torch.randn(1, *shape[1:], generator=made)
                B = torch.randn(shape[0], 1, *[1] * (len(shape) - 2), generator=made)
                updates[name] = lk.Factors(A, B, 1.0, "conv" if len(shape) > 2 else "linear")
    return lk.Adapter(lk.LoraConfig(rank=1, alpha=1), updates, metadata={"model": model} | metadata)


def denoiser(model: str) -> str:
    return next(iter(names.PIPELINES[model]))


@pytest.mark.parametrize("program", image_programs.PROGRAMS)
@pytest.mark.parametrize("model", FAMILIES)
def test_every_key_is_found_or_the_family_is_refused(model, program, tmp_path):
    value = adapter(model, denoiser(model))
    if model in REFUSED[program]:
        with pytest.raises(AdapterError, match=rf"A1111 has no {model}\n  export it for ComfyUI"):
            export(value, tmp_path / "x.safetensors", program, verify=True)
        assert not list(tmp_path.iterdir())
        return
    done = export(value, tmp_path / "x.safetensors", program, verify=True)
    keys = load_file(done.files[0])
    paths = {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in keys}
    assert done.placed.unread == []
    assert sum(done.placed.read.values()) == len(paths) > 8
    assert done.difference < 1e-6


def test_comfyui_gets_the_keys_that_its_table_has(tmp_path):
    found = {}
    for model in ("sd1", "sdxl", "flux", "qwen_image", "z_image", "wan"):
        done = export(adapter(model, denoiser(model)), tmp_path / f"{model}.safetensors", "comfyui")
        found[model] = {key.split(".lora_")[0].removesuffix(".alpha") for key in load_file(done.files[0])}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in found["sd1"]
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in found["sdxl"]
    assert "lora_unet_double_blocks_0_img_attn_qkv" in found["flux"]
    assert "diffusion_model.transformer_blocks.0.attn.to_q" in found["qwen_image"]
    assert "diffusion_model.layers.0.attention.to_q" in found["z_image"]
    assert "diffusion_model.blocks.0.self_attn.q" in found["wan"]


@pytest.mark.parametrize(
    "program, model, component, refused",
    [
        ("comfyui", "sd1", "text_encoder", False),
        ("comfyui", "sdxl", "text_encoder_2", False),
        ("comfyui", "sd3", "text_encoder_3", False),
        ("a1111", "sdxl", "text_encoder_2", False),
        ("a1111", "sd3", "text_encoder_3", True),
        ("diffusers", "sd3", "text_encoder_3", True),
        ("diffusers", "flux", "text_encoder", False),
        ("diffusers", "flux", "text_encoder_2", True),
    ],
)
def test_text_encoders_are_counted_apart_and_refused_where_nothing_loads_them(
    program, model, component, refused, tmp_path
):
    value = adapter(model, denoiser(model), component)
    inside = [
        m for m in value.updates if not m.startswith(component) or re.search(r"self_attn|mlp|SelfAttention|wi|wo", m)
    ]
    value = value.select(inside)
    if refused:
        with pytest.raises(AdapterError, match=rf"{program} would not read \d+ of the file's \d+ entries: \S"):
            export(value, tmp_path / "x.safetensors", program)
        assert not list(tmp_path.iterdir())
    else:
        done = export(value, tmp_path / "x.safetensors", program)
        texts = sum(m.startswith(component) for m in value.updates)
        assert done.placed.read[component] == texts > 0
        assert str(done.placed).endswith(f", {texts} of text encoders")


def test_a_key_that_no_program_knows_is_named():
    good = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    for key in ("lora_unet_input_blocks_99_1_to_q.lora_up.weight", f"{good}.oft_blocks", "unet.nonsense.lora_A.weight"):
        for program in ("comfyui", "a1111"):
            said = image_programs.placed(program, "sdxl", [f"{good}.lora_up.weight", f"{good}.alpha", key])
            assert said.read == {"unet": 1}
            assert len(said.unread) == 1
            assert key.startswith(said.unread[0])


def test_of_an_unknown_model_nothing_is_claimed(tmp_path):
    update = lk.Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    value = lk.Adapter(lk.LoraConfig(rank=1, alpha=1), {"diffusion_model.strange.blocks.0.q": update})
    done = export(value, tmp_path / "x.safetensors", "comfyui", verify=True)
    assert done.placed is None
    assert "it was not checked" in done.unchecked
    assert done.format == "comfyui"


@pytest.mark.parametrize("program", ["comfyui", "diffusers"])
def test_tokens_go_into_files_of_their_own_where_a_program_reads_those(program, tmp_path):
    from dataclasses import replace

    value = replace(adapter("sd1", "unet"), embeddings={"<sks>": torch.ones(2, 768)})
    done = export(value, tmp_path / "x.safetensors", program, verify=True)
    assert [file.name for file in done.files] == ["x.safetensors", "sks.safetensors"]
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "sks.safetensors").items()} == {"<sks>": (2, 768)}
    assert not [key for key in load_file(tmp_path / "x.safetensors") if "emb" in key]
    assert any("sks" in note for note in done.notes)
    before = (tmp_path / "sks.safetensors").read_bytes()
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"sks\.safetensors exists\n  --force"):
        export(replace(value, embeddings={"<sks>": torch.zeros(1, 768)}), tmp_path / "x.safetensors", program)
    assert (tmp_path / "sks.safetensors").read_bytes() == before
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("program, out", [("comfyui", "sks.safetensors"), ("diffusers", "SKS.safetensors")])
def test_a_tokens_file_never_replaces_the_adapters(program, out, tmp_path):
    from dataclasses import replace

    value = replace(adapter("sd1", "unet"), embeddings={"<sks>": torch.ones(2, 768)})
    (tmp_path / out).write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"name another OUT, such as .*-lora\.safetensors"):
            export(value, tmp_path / out, program, force=force)
    assert [path.name for path in tmp_path.iterdir()] == [out]
    assert (tmp_path / out).read_text() == "mine"


@pytest.mark.parametrize("program", ["comfyui", "a1111"])
def test_a_name_that_the_program_does_not_list_is_refused(program, tmp_path):
    for out in ("style", "style.v2", "style.pt"):
        with pytest.raises(ConfigError, match=rf"lists \.safetensors files alone\n.*{out}\.safetensors"):
            export(adapter("sd1", "unet"), tmp_path / out, program)
    assert not list(tmp_path.iterdir())


def test_the_note_names_each_token(tmp_path):
    from dataclasses import replace

    value = replace(adapter("sd1", "unet"), embeddings={"a": torch.ones(1, 768), "<a>": torch.zeros(1, 768)})
    done = export(value, tmp_path / "x.safetensors", "comfyui", verify=True)
    assert torch.equal(load_file(tmp_path / "a-2.safetensors")["<a>"], torch.zeros(1, 768))
    assert any("the token '<a>' is in a-2.safetensors" in note for note in done.notes)


def test_a1111_gets_them_in_the_same_file(tmp_path):
    from dataclasses import replace

    value = replace(adapter("sd1", "unet"), embeddings={"sks": torch.ones(2, 768)})
    done = export(value, tmp_path / "x.safetensors", "a1111", verify=True)
    assert [file.name for file in done.files] == ["x.safetensors"]
    assert "bundle_emb.sks.string_to_param.*" in load_file(done.files[0])
    assert done.differences["saved weights"] == 0


def test_the_old_name_of_a_clip_layer_is_written_with_its_level(tmp_path):
    value = adapter("sd1", "unet", "text_encoder")
    value = value.select([m for m in value.updates if "embed" not in m and "projection" not in m])
    old = {m.replace("text_encoder.text_model.", "text_encoder."): u for m, u in value.updates.items()}
    for program in image_programs.PROGRAMS:
        done = export(lk.Adapter(value.config, old), tmp_path / f"{program}.safetensors", program, verify=True)
        assert done.placed.read["text_encoder"] > 0
        assert all("text_model" in key for key in load_file(done.files[0]) if key.startswith(("lora_te", "text_enc")))
