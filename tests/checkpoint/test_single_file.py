"""Where the weights of single-file checkpoints lie, against diffusers' own converters: every module of all five models.

The files are made of the original code's names with numbers that occur once, so that a wrong row is seen. Widths are a
64th of the published ones, but for Flux's `linear1`, whose rows the converter counts out.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.checkpoint import single_file
from lorakit.checkpoint.single_file import bias_rows, model_of_file, module_rows
from lorakit.errors import LorakitError
from lorakit.formats import names

theirs = pytest.importorskip("diffusers.loaders.single_file_utils")

DENOISER = "model.diffusion_model."
FIRST_CONV, LAST_CONV = "input_blocks.0.0.weight", "out.2.weight"


class Numbers:
    """Tensors of numbers that no other tensor has."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, *shape: int) -> torch.Tensor:
        start, self.next = self.next, self.next + math.prod(shape)
        return torch.arange(start, self.next, dtype=torch.float64).reshape(shape)


def small(shape) -> tuple[int, ...]:
    return tuple(s // 64 if s >= 64 else s for s in shape)


def listed(model: str, component: str) -> dict:
    return names.module_list(names.PIPELINES[model][component].listed)


def denoiser(model: str, number: Numbers) -> dict[str, torch.Tensor]:
    """Its weights and biases, each tensor with the rows of all modules that share it."""
    component = next(iter(names.PIPELINES[model]))
    known, file = listed(model, component), {}
    for name, modules in known["ldm"].items():
        each = [small(known["modules"][module]) for module in modules]
        shape = (21504, 1) if name.endswith("linear1") else (sum(s[0] for s in each), *each[0][1:])
        file[f"{name}.weight"], file[f"{name}.bias"] = number(*shape), number(shape[0])
    return file


def sd3_denoiser(blocks: int, dual: int, number: Numbers) -> dict[str, torch.Tensor]:
    """SD3 with some blocks, the first of them with a second attention; the last gives its context a shift and a scale
    only.
    """
    file, width, last = {}, 4, f"joint_blocks.{blocks - 1}.context_block."
    rows = {"qkv": 3 * width, "fc1": 4 * width, "adaLN_modulation.1": 6 * width}
    for name in listed("sd3", "transformer")["ldm"]:
        block = int(name.split(".")[1]) if name.startswith("joint_blocks.") else 0
        if (
            block >= blocks
            or ("attn2" in name and block >= dual)
            or (name.startswith(last) and name.endswith(("proj", "fc1", "fc2")))
        ):
            continue
        out = next((r for ending, r in rows.items() if name.endswith(ending)), width)
        out = 2 * width if name == f"{last}adaLN_modulation.1" or name.startswith("final_layer.adaLN") else out
        shape = (width, 2, 2, 2) if name == "x_embedder.proj" else (out, 4 * width if name.endswith("fc2") else width)
        file[f"{name}.weight"], file[f"{name}.bias"] = number(*shape), number(out)
    return file


def transformers_encoder(model: str, component: str, prefix: str, number: Numbers) -> dict[str, torch.Tensor]:
    file = {}
    for name, shape in listed(model, component)["modules"].items():
        file[f"{prefix}{name}.weight"] = number(*small(shape))
        if "text_projection" not in name and "encoder.block" not in name:
            file[f"{prefix}{name}.bias"] = number(small(shape)[0])
    return file


def open_clip_encoder(prefix: str, layers: int, width: int, number: Numbers) -> dict[str, torch.Tensor]:
    file = {f"{prefix}ln_final.weight": number(width), f"{prefix}ln_final.bias": number(width)}
    file |= {f"{prefix}text_projection": number(width, width), f"{prefix}positional_embedding": number(7, width)}
    parts = {
        "attn.out_proj.": (width, width),
        "ln_1.": (width,),
        "ln_2.": (width,),
        "mlp.c_fc.": (4 * width, width),
        "mlp.c_proj.": (width, 4 * width),
    }
    for layer in range(layers):
        at = f"{prefix}transformer.resblocks.{layer}."
        for part, shape in parts.items():
            file[f"{at}{part}weight"], file[f"{at}{part}bias"] = number(*shape), number(shape[0])
        file[f"{at}attn.in_proj_weight"], file[f"{at}attn.in_proj_bias"] = number(3 * width, width), number(3 * width)
    return file


def shapes_of(file: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in file.items()}


def at(place: single_file.WeightRows, file: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = file[place.tensor][place.start : place.stop]
    rows = torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows
    return rows.T if place.transposed else rows


def check(model: str, component: str, file: dict[str, torch.Tensor], converted: dict[str, torch.Tensor]) -> None:
    """The modules of one component, all of them: weight and bias as diffusers reads them."""
    shapes = shapes_of(file)
    assert model_of_file(shapes) == model
    ours = {
        m.removeprefix(f"{component}."): p
        for m, p in module_rows(model, shapes).items()
        if m.startswith(f"{component}.")
    }
    known = {n.removeprefix(f"{component}.") for n in names.shapes(model)}
    assert set(ours) == {key.removesuffix(".weight") for key in converted if key.endswith(".weight")} & known
    for module, place in ours.items():
        assert torch.equal(at(place, file), converted[f"{module}.weight"]), module
        bias = bias_rows(model, f"{component}.{module}", shapes)
        assert (bias is not None) == (f"{module}.bias" in converted), module
        if bias is not None:
            assert torch.equal(at(bias, file), converted[f"{module}.bias"]), module


def prefixed(file: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {DENOISER + name: tensor for name, tensor in file.items()}


@pytest.mark.parametrize("model, modules", [("sd1", 391), ("sd2", 391), ("sdxl", 1050)])
def test_a_unets_modules_are_where_diffusers_converter_finds_them(model, modules):
    file = prefixed(denoiser(model, Numbers()))
    config = {
        "layers_per_block": 2,
        "class_embed_type": None,
        "addition_embed_type": "text_time" if model == "sdxl" else None,
    }
    if model == "sd2":
        file["cond_stage_model.model.ln_final.weight"] = torch.zeros(1)
    converted = theirs.convert_ldm_unet_checkpoint(dict(file), config)
    check(model, "unet", file, converted)
    assert sum(name.startswith("unet.") for name in module_rows(model, shapes_of(file))) == modules


@pytest.mark.parametrize(
    "blocks, dual", [(24, 0), (24, 13), (38, 0), (2, 1)], ids=["medium", "3.5-medium", "3.5-large", "two blocks"]
)
def test_sd3s_modules_are_where_diffusers_converter_finds_them(blocks, dual):
    file = prefixed(sd3_denoiser(blocks, dual, Numbers()))
    converted = theirs.convert_sd3_transformer_checkpoint_to_diffusers({**file, f"{DENOISER}pos_embed": torch.zeros(1)})
    check("sd3", "transformer", file, converted)


def test_fluxs_modules_are_where_diffusers_converter_finds_them():
    file = prefixed(denoiser("flux", Numbers()))
    scales = {
        f"{DENOISER}{block}.{norm}norm.{x}_norm.scale": torch.zeros(1)
        for block, norm in [(f"double_blocks.{i}", f"{side}_attn.") for i in range(19) for side in ("img", "txt")]
        + [(f"single_blocks.{i}", "") for i in range(38)]
        for x in ("query", "key")
    }
    converted = theirs.convert_flux_transformer_checkpoint_to_diffusers({**file, **scales})
    check("flux", "transformer", file, converted)
    assert len(module_rows("flux", shapes_of(file))) == 504


@pytest.mark.parametrize(
    "model, component, prefix",
    [
        ("sd1", "text_encoder", "cond_stage_model.transformer."),
        ("sdxl", "text_encoder", "conditioner.embedders.0.transformer."),
        ("sd3", "text_encoder", "text_encoders.clip_l.transformer."),
        ("sd3", "text_encoder_2", "text_encoders.clip_g.transformer."),
        ("sd3", "text_encoder_3", "text_encoders.t5xxl.transformer."),
        ("flux", "text_encoder", "text_encoders.clip_l.transformer."),
        ("flux", "text_encoder_2", "text_encoders.t5xxl.transformer."),
    ],
)
def test_text_encoders_under_transformers_names_are_where_diffusers_converter_finds_them(model, component, prefix):
    number = Numbers()
    file = prefixed(signs(model)) | transformers_encoder(model, component, prefix, number)
    if "t5xxl" in prefix:
        converted = theirs.convert_sd3_t5_checkpoint_to_diffusers(dict(file))
    else:
        converted = theirs.convert_ldm_clip_checkpoint(dict(file), prefix)
    check(model, component, file, converted)
    assert {f"{component}.{name}" for name in listed(model, component)["modules"]} <= set(
        module_rows(model, shapes_of(file))
    )


@pytest.mark.parametrize(
    "model, component, prefix, layers, width",
    [
        ("sd2", "text_encoder", "cond_stage_model.model.", 24, 6),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.", 32, 5),
    ],
)
def test_open_clips_packed_rows_are_where_diffusers_converter_finds_them(model, component, prefix, layers, width):
    """SD2's last layer and projection, which its pipeline does not use, are left alone; SDXL's projection is stored
    across.
    """
    file = prefixed(signs(model)) | open_clip_encoder(prefix, layers, width, Numbers())
    shell = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    converted = theirs.convert_open_clip_checkpoint(shell, dict(file), prefix=prefix)
    check(model, component, file, converted)
    found = {name.partition(".")[2] for name in module_rows(model, shapes_of(file)) if name.startswith(f"{component}.")}
    assert found == set(listed(model, component)["modules"]) - ({"text_projection"} if model == "sd2" else set())


def signs(model: str) -> dict[str, torch.Tensor]:
    """The least by which a file's model is told."""
    number = Numbers()
    keys = single_file._SIGNS[model if model in single_file._SIGNS else "unet"]
    file = {key: number(6, 2) for key in keys}
    if model in ("sd1", "sd2"):
        file |= {"input_blocks.9.0.op.weight": number(2, 2, 3, 3), "input_blocks.1.1.norm.weight": number(2)}
        file |= {"input_blocks.1.1.proj_in.weight": number(2, 2, 1, 1) if model == "sd1" else number(2, 2)}
    return file | ({"label_emb.0.0.weight": number(2, 2)} if model == "sdxl" else {})


@pytest.mark.parametrize("model", names.MODELS)
def test_at_the_published_sizes_each_place_has_its_modules_shape(model):
    """As many rows as the module's weight has, and the shift's and scale's order as in the kohya files of the same
    names.
    """
    component = next(iter(names.PIPELINES[model]))
    known = listed(model, component)
    shapes = {
        f"{name}.weight": (sum(known["modules"][m][0] for m in modules), *known["modules"][modules[0]][1:])
        for name, modules in known["ldm"].items()
    }
    found = module_rows(model, shapes)
    assert set(found) == {f"{component}.{name}" for name in known["modules"]}
    for module, place in found.items():
        shape = names.shapes(model)[module]
        assert (place.stop - place.start, *shapes[place.tensor][1:]) == shape
        assert place.swapped == (len(shape) == 2 and names.swaps_halves(model, "", module, shape))


@pytest.mark.parametrize("model", names.MODELS)
def test_a_bare_denoiser_and_one_without_text_encoders_are_read(model):
    file = denoiser(model, Numbers())
    bare, full = shapes_of(file), shapes_of(prefixed(file))
    if model == "sd1":  # nothing but its widths tells it from SD2
        bare["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (320, 768)
    assert model_of_file(bare) == model
    assert {name: DENOISER + place.tensor for name, place in module_rows(model, bare).items()} == {
        name: place.tensor for name, place in module_rows(model, full).items()
    }


def test_sd1_and_sd2_are_told_by_text_encoder_then_width_then_the_first_projection():
    file = shapes_of(prefixed(signs("sd1")))
    width = f"{DENOISER}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert model_of_file(file) == "sd1"
    assert model_of_file(file | {width: (320, 1024)}) == "sd2"
    assert model_of_file(shapes_of(prefixed(signs("sd2"))) | {width: (320, 768)}) == "sd1"
    assert model_of_file(file | {width: (320, 768), "cond_stage_model.model.ln_final.weight": (1024,)}) == "sd2"


def test_a_text_encoder_without_the_level_text_model_is_found():
    file = {
        "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.weight": (8, 2),
        "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.bias": (8,),
    }
    found = module_rows("sd1", file)
    place = found["text_encoder.text_model.encoder.layers.3.mlp.fc1"]
    assert place == ("cond_stage_model.transformer.encoder.layers.3.mlp.fc1.weight", 0, 8, False, False)
    assert len(found) == 1


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(LorakitError, match=r"'double_blocks.0.img_attn.qkv.weight' has 10 rows"):
        module_rows("flux", {"double_blocks.0.img_attn.qkv.weight": (10, 3)})
    with pytest.raises(LorakitError, match="expected q, k and v"):
        module_rows("sdxl", {"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (10, 3)})
    with pytest.raises(LorakitError, match="is a scalar"):
        module_rows("sd1", {"input_blocks.0.0.weight": ()})


def test_a_bias_of_other_rows_is_refused_and_a_missing_one_is_none():
    weight = {"img_in.weight": (8, 4)}
    assert bias_rows("flux", "transformer.x_embedder", weight) is None
    assert bias_rows("flux", "transformer.x_embedder", {"img_in.bias": (8,), "txt_in.weight": (8, 4)}) is None
    assert bias_rows("flux", "transformer.x_embedder", weight | {"img_in.bias": (8,)}) == (
        "img_in.bias",
        0,
        8,
        False,
        False,
    )
    with pytest.raises(LorakitError, match=r"'img_in.bias' has shape \[7\]"):
        bias_rows("flux", "transformer.x_embedder", weight | {"img_in.bias": (7,)})


@pytest.mark.parametrize(
    "file, what",
    [
        ({}, "no tensors"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 8)}, "an adapter"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "an adapter"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "the pipeline's folder"),
        ({"transformer_blocks.0.attn.to_q.weight": (8, 8)}, "the pipeline's folder"),
        ({"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}, "a VAE"),
        ({"decoder.up.0.block.0.conv1.weight": (8, 4, 3, 3)}, "a VAE"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (8, 4)}, "a text encoder"),
        ({"model.layers.0.self_attn.q_proj.weight": (8, 8)}, "a language model"),
        (
            {"double_blocks.0.img_attn.qkv.weight": (24, 8), "distilled_guidance_layer.in_proj.weight": (8, 8)},
            "a Chroma model",
        ),
        ({"model.diffusion_model.double_stream_modulation_img.lin.weight": (24, 8)}, "a Flux.2 model"),
        ({"something.else": (2,)}, "its tensors are something.else"),
    ],
)
def test_another_file_is_refused_with_what_it_looks_like(file, what):
    with pytest.raises(LorakitError, match=what):
        model_of_file(file)


def test_the_refiner_a_video_model_and_quantized_weights_are_refused():
    refiner = shapes_of(prefixed(signs("sd1"))) | {f"{DENOISER}label_emb.0.0.weight": (2, 2)}
    del refiner[f"{DENOISER}input_blocks.1.1.norm.weight"]
    with pytest.raises(LorakitError, match="the SDXL refiner"):
        model_of_file(refiner)
    unknown = shapes_of(prefixed(signs("sdxl")))
    del unknown[f"{DENOISER}label_emb.0.0.weight"]
    with pytest.raises(LorakitError, match="none of these"):
        model_of_file(unknown)
    with pytest.raises(LorakitError, match="a video model"):
        model_of_file(
            shapes_of(prefixed(signs("sd2"))) | {f"{DENOISER}input_blocks.1.1.time_stack.0.norm1.weight": (2,)}
        )
    nf4 = shapes_of(prefixed(signs("flux"))) | {f"{DENOISER}img_in.weight.absmax": (8,)}
    with pytest.raises(LorakitError, match=r"quantized \(model.diffusion_model.img_in.weight.absmax\)"):
        model_of_file(nf4)
    # An encoder's rounded weights do not matter to what changes the denoiser; merging refuses them by their dtype.
    assert (
        model_of_file(shapes_of(prefixed(signs("sd3"))) | {"text_encoders.t5xxl.transformer.scaled_fp8": (0,)}) == "sd3"
    )


PREFIXES = (
    "",
    DENOISER,
    *(p for parts in single_file.TEXT_ENCODERS.values() for known in parts.values() for p, _ in known),
)
ENDINGS = sorted(
    {
        f"{name}.weight"
        for model in names.MODELS
        for part in names.PIPELINES[model].values()
        for name in names.module_list(part.listed).get("ldm", {})
    }
    | {
        f"transformer.resblocks.{i}.{x}"
        for i in (0, 1)
        for x in ("attn.in_proj_weight", "attn.out_proj.weight", "ln_1.weight", "mlp.c_fc.weight")
    }
    | {
        "text_projection",
        "ln_final.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    }
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(names.MODELS),
    st.dictionaries(
        st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from(ENDINGS)),
        st.lists(st.integers(0, 40), max_size=4).map(tuple),
        max_size=12,
    ),
)
def test_whatever_the_shapes_places_lie_within_their_tensors_and_never_overlap(model, shapes):
    try:
        found = module_rows(model, shapes)
    except LorakitError:
        return
    taken: dict[str, list[tuple[int, int]]] = {}
    for place in found.values():
        assert 0 <= place.start <= place.stop <= shapes[place.tensor][0]
        taken.setdefault(place.tensor, []).append((place.start, place.stop))
    for rows in taken.values():
        rows.sort()
        assert all(stop <= start for (_, stop), (start, _) in pairwise(rows))
        assert (rows[0][0], rows[-1][1]) == (0, sum(stop - start for start, stop in rows))
    for module in found:
        try:
            bias_rows(model, module, shapes)
        except LorakitError:
            continue
