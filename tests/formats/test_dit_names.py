"""The names of the diffusion transformers against diffusers' own LoRA converters: each converter's input is read as its
output says, and written back under the keys that were read.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit import formats
from lorakit.formats import names

conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
RANK = 2


def natives(model: str) -> dict[str, tuple[str, ...]]:
    """The original code's name -> diffusers' modules, of linear layers in the first two blocks."""
    listed = names.module_list(model)
    found = listed.get("ldm") or {name: [name] for name in listed["modules"]}
    return {
        name: tuple(modules)
        for name, modules in found.items()
        if len(listed["modules"][modules[0]]) == 2 and not re.search(r"\.([2-9]|\d\d+)\.", re.sub(r"net\.2", "", name))
    }


def pairs(model: str, native: dict[str, tuple[str, ...]], down: str, up: str, alpha: float | None, front: str = ""):
    """Random factors of rank 2 for each native module, in its real shape."""
    torch.manual_seed(0)
    listed, tensors = names.module_list(model)["modules"], {}
    for name, modules in native.items():
        out, inputs = sum(listed[m][0] for m in modules), listed[modules[0]][1]
        tensors[f"{front}{name}.{down}"] = torch.randn(RANK, inputs)
        tensors[f"{front}{name}.{up}"] = torch.randn(out, RANK)
        if alpha is not None:
            tensors[f"{front}{name}.alpha"] = torch.tensor(alpha)
    return tensors


def through(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """ΔW times a vector: every row of ΔW counts, and the matrix itself is never made."""
    return B @ (A @ torch.linspace(-1, 1, A.shape[1], dtype=A.dtype))


def seen(f: lk.Factors) -> torch.Tensor:
    return f.scale * through(f.B, f.A)


def flat(tensors: dict[str, torch.Tensor], prefix: str = "lora_unet_") -> dict[str, torch.Tensor]:
    """kohya's and musubi-tuner's spelling of the same."""
    suffix = re.compile(r"\.((lora_down|lora_up)\.weight|alpha|lokr_w\d(_[ab])?)$")
    return {
        prefix + suffix.sub("", key).replace(".", "_") + suffix.search(key)[0]: tensor
        for key, tensor in tensors.items()
    }


AB, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
COMFY = "diffusion_model."
# name -> (model, converter, front, suffixes, alpha, flat, what of the natives the converter takes)
CASES = {
    "flux2": (
        "flux2",
        "non_diffusers_flux2",
        COMFY,
        AB,
        None,
        False,
        r"double|single|img_in|txt_in|final_layer\.linear",
    ),
    "flux2 down": ("flux2", "non_diffusers_flux2", COMFY, KOHYA, None, False, r"double|single"),
    "flux2 kohya": ("flux2", "kohya_flux2", "", KOHYA, 1.0, True, r"double_blocks|single_blocks|img_in|time_in"),
    "wan": ("wan", "non_diffusers_wan", COMFY, AB, None, False, r"^blocks|time_|text_|head|img_emb"),
    "wan alpha": ("wan", "non_diffusers_wan", COMFY, KOHYA, 1.0, False, r"^blocks\.\d+\.(self|cross|ffn)"),
    "wan musubi": ("wan", "musubi_wan", "", KOHYA, 4.0, True, r"^blocks\.\d+\.((self|cross)_attn|ffn)"),
    "qwen": ("qwen_image", "non_diffusers_qwen", COMFY, AB, 1.0, False, r"."),
    "qwen default": ("qwen_image", "non_diffusers_qwen", "", DEFAULT, None, False, r"transformer_blocks"),
    "qwen musubi": ("qwen_image", "non_diffusers_qwen", "", KOHYA, 1.0, True, r"."),
    "z-image": ("z_image", "non_diffusers_z_image", COMFY, KOHYA, 1.0, False, r"^layers.*(to_|out|feed)"),
    "z-image diffsynth": ("z_image", "non_diffusers_z_image", "", DEFAULT, None, False, r"^(layers|noise).*(to_|feed)"),
    "z-image musubi": ("z_image", "non_diffusers_z_image", "", KOHYA, 1.0, True, r"^layers.*(to_|feed)"),
    "hunyuan": (
        "hunyuan_video",
        "hunyuan_video",
        COMFY,
        AB,
        None,
        False,
        r"^(double|single|time_in|vector_in|final_layer\.linear)",
    ),
    "hunyuan transformer.": ("hunyuan_video", "hunyuan_video", "transformer.", AB, None, False, r"^double|^single"),
    "ltx": ("ltx", "non_diffusers_ltxv", COMFY, AB, None, False, r"transformer_blocks"),
    "ltx2": ("ltx2", "non_diffusers_ltx2", COMFY, AB, None, False, r"."),
    "lumina2": ("lumina2", "non_diffusers_lumina2", COMFY, AB, None, False, r"^layers|_refiner"),
    "hidream": ("hidream", "non_diffusers_hidream", COMFY, AB, None, False, r"_blocks"),
    "anima": ("cosmos", "non_diffusers_anima", COMFY, AB, None, False, r"."),
    "ideogram4": ("ideogram4", "non_diffusers_ideogram4", COMFY, AB, None, False, r"^layers"),
    "krea2": ("krea2", "non_diffusers_krea2", COMFY, AB, None, False, r"^(?!last\.adaln|txtfusion\.proj)"),
    "krea2 ai-toolkit": ("krea2", "non_diffusers_krea2", "base_model.model.", AB, None, False, r"^blocks"),
    "minimax": ("minimax_h3", "non_diffusers_minimax_h3", COMFY, KOHYA, 1.0, False, r"."),
    "minimax musubi": ("minimax_h3", "non_diffusers_minimax_h3", "", KOHYA, 1.0, True, r"."),
    "flux3": ("flux3", "non_diffusers_flux3", COMFY, AB, None, False, r"blocks"),
}


def made(case: str) -> tuple[str, dict[str, torch.Tensor]]:
    model, _, front, (down, up), alpha, is_flat, taken = CASES[case]
    native = {name: modules for name, modules in natives(model).items() if re.search(taken, name)}
    if case.startswith(("z-image", "krea2")) and "to_" in taken:  # trainers that take diffusers' own class
        listed = names.module_list(model)["modules"]
        own = {n: (n,) for n, shape in listed.items() if len(shape) == 2 and re.search(r"^\w+\.[01]\.", n)}
        native = {n: modules for n, modules in own.items() if re.search(taken, n)}
    tensors = pairs(model, native, down, up, alpha, front)
    return model, flat(tensors) if is_flat else tensors


@pytest.mark.parametrize("case", CASES)
def test_each_converters_input_is_read_as_its_output(case, tmp_path):
    model, tensors = made(case)
    save_file(tensors, tmp_path / "x.safetensors")
    ours = lk.Adapter.load(tmp_path / "x.safetensors")
    theirs = getattr(conversion, f"_convert_{CASES[case][1]}_lora_to_diffusers")(dict(tensors))
    expected = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith(".lora_A.weight")}
    assert {module if module.startswith("transformer.") else f"transformer.{module}" for module in expected} == set(
        ours.updates
    )
    assert len(expected) > 4
    # diffusers forgets that BFL's last norm has shift and scale in the other order; its checkpoint converters do not.
    for module in expected - {"transformer.norm_out.linear"}:
        down, up = theirs[f"{module}.lora_A.weight"], theirs[f"{module}.lora_B.weight"]
        torch.testing.assert_close(seen(ours.updates[module]), through(up, down), atol=1e-3, rtol=1e-4)
    assert ours.metadata.get("model", model) == model


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_written_back_under_the_same_keys(case, tmp_path):
    _, tensors = made(case)
    source = tmp_path / "x.safetensors"
    save_file(tensors, source)
    adapter = lk.Adapter.load(source)
    path = formats.save_as_read(2.0 * adapter, tmp_path / "again.safetensors", formats.format_of(source))
    again = load_file(path)
    assert {k.replace(".default", "") for k in tensors} <= {*again, *(k for k in tensors if k.endswith(".alpha"))}
    assert {k for k in again if not k.endswith(".alpha")} == {
        k.replace(".default", "") for k in tensors if not k.endswith(".alpha")
    }
    other = lk.Adapter.load(path)
    assert other.updates.keys() == adapter.updates.keys()
    for module, update in adapter.updates.items():
        torch.testing.assert_close(seen(other.updates[module]), 2 * seen(update))


@pytest.mark.parametrize("model", [m for m in names.KNOWN if m not in names.MODELS])
@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
def test_every_format_of_a_model_holds_the_same(model, to, tmp_path):
    listed = names.module_list(model)["modules"]
    linear = [n for n, shape in listed.items() if len(shape) == 2 and re.search(r"\.[01]\.", n)][:12]
    torch.manual_seed(0)
    updates = {
        f"transformer.{n}": lk.Factors(torch.randn(2, listed[n][1]), torch.randn(listed[n][0], 2), 1.0) for n in linear
    }
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=1, targets=["x"]), updates)
    adapter.save(tmp_path / "x.safetensors", to)
    again = lk.Adapter.load(tmp_path / "x.safetensors")
    for module, update in updates.items():
        torch.testing.assert_close(seen(again.updates[module]), seen(update), atol=1e-3, rtol=1e-5)
    if to == "kohya":
        assert again.metadata["model"] == model


def test_bfls_last_norm_has_its_halves_exchanged_as_in_diffusers_checkpoint_converter(tmp_path):
    """Shift and scale there, scale and shift here."""
    from diffusers.loaders.single_file_utils import swap_scale_shift

    A, B = torch.randn(2, 6144), torch.randn(12288, 2)
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    double = "diffusion_model.double_stream_modulation_img.lin"
    save_file(
        {
            f"{name}.lora_A.weight": A,
            f"{name}.lora_B.weight": B,
            f"{double}.lora_A.weight": A.clone(),
            f"{double}.lora_B.weight": torch.randn(36864, 2),
        },
        tmp_path / "x.safetensors",
    )
    f = lk.Adapter.load(tmp_path / "x.safetensors").factors["transformer.norm_out.linear"]
    assert torch.equal(f.B, swap_scale_shift(B, 0))


LOKR = ("lokr_w1", "lokr_w2")


@pytest.mark.parametrize("front, prefix", [("diffusion_model.", None), ("", "lycoris_")])
def test_flux2_lokr_in_both_spellings(front, prefix, tmp_path):
    modules = ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.1.ff.linear_in")
    native = ("single_blocks.0.linear1", "double_blocks.1.img_mlp.0")
    torch.manual_seed(0)
    tensors = {}
    for name, out in zip(modules if prefix else native, (55296, 36864), strict=True):
        own = {f"{front}{name}.lokr_w1": torch.randn(16, 16), f"{front}{name}.lokr_w2": torch.randn(out // 16, 384)}
        tensors |= flat(own, prefix) if prefix else own
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    assert set(adapter.updates) == {f"transformer.{m}" for m in modules}
    convert = "lycoris_flux2" if prefix else "non_diffusers_flux2"
    theirs = getattr(conversion, f"_convert_{convert}_lokr_to_diffusers")(dict(tensors))
    for module in modules:
        update = adapter.updates[f"transformer.{module}"]
        for which, name in (("w1", "lokr_w1"), ("w2", "lokr_w2")):
            assert torch.equal(getattr(update, which), theirs[f"transformer.{module}.{name}"])
    if prefix is None:
        path = formats.save_as_read(adapter, tmp_path / "again.safetensors", "diffusers")
        assert {k for k in load_file(path) if not k.endswith(".alpha")} == tensors.keys()
