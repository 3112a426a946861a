"""kohya's files: what real programs make of them, every model's naming, round trips, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.config import LoraConfig
from lorakit.errors import AdapterError
from lorakit.formats import kohya, lycoris, names
from lorakit.io.tensors import read_tensors

CONFIG = LoraConfig(rank=4, alpha=4, targets=["to_q"])
ONE = {  # a module of each model that no other model has, or has in this width
    "sd1": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "sd2": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "sdxl": "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
    "sd3": "transformer.transformer_blocks.23.attn.to_q",
    "flux": "transformer.single_transformer_blocks.37.attn.to_q",
}


def factors(module: str, model: str, rank: int = 4, alpha: float = 2.0, dtype=torch.float32, width=None) -> Factors:
    """Random factors for a module in its real shape (or a narrow one)."""
    shape = names.shapes(model)[module]
    out, columns = (shape[0], shape[1]) if width is None else width
    kernel, kind = shape[2:], "conv" if len(shape) > 2 else "linear"
    return Factors(
        torch.randn(rank, columns, *kernel).to(dtype),
        torch.randn(out, rank, *(1,) * len(kernel)).to(dtype),
        alpha,
        kind,
    )


def read(path) -> Adapter:
    return kohya.read(path, *read_tensors(path))


def double(update: Factors) -> torch.Tensor:
    return replace(update, A=update.A.double(), B=update.B.double()).delta()


def same(a: Adapter, b: Adapter) -> None:
    """Equal bit for bit: tensors, their precision, ranks, alphas."""
    assert a.updates.keys() == b.updates.keys()
    for module, update in a.updates.items():
        other = b.updates[module]
        assert type(other) is type(update), module
        assert other.scale == pytest.approx(update.scale, rel=1e-11), module
        assert other.tensors().keys() == update.tensors().keys()
        for name, tensor in update.tensors().items():
            assert other.tensors()[name].dtype == tensor.dtype
            assert torch.equal(other.tensors()[name], tensor), (module, name)


@pytest.fixture(scope="module")
def tiny_unet():
    """SD1.5's topology, 8 channels wide."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=6,
        layers_per_block=2,
    ).double()


def test_diffusers_makes_of_a_written_file_the_same_weights(tiny_unet, tmp_path):
    """Convolutions, mixed ranks and mixed alphas, through diffusers' own loader; alphas baked, which it otherwise
    loses.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    torch.manual_seed(1)
    weights = {
        name: m.weight for name, m in tiny_unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    updates = {
        f"unet.{name}": factors(f"unet.{name}", "sd1", 1 + i % 3, 0.5 + i % 5, torch.float64, w.shape[:2])
        for i, (name, w) in enumerate(weights.items())
    }
    kohya.write(Adapter(CONFIG, updates), tmp_path / "a.safetensors", bake_alpha=True)
    before = {name: w.detach().clone() for name, w in weights.items()}
    state, alphas = Mixin.lora_state_dict(tmp_path, weight_name="a.safetensors", unet_config=tiny_unet.config)
    Mixin.load_lora_into_unet(state, alphas, tiny_unet)
    tiny_unet.fuse_lora()
    for name, module in tiny_unet.named_modules():
        if hasattr(module, "base_layer") and name in before:
            added = module.base_layer.weight.detach() - before[name]
            torch.testing.assert_close(added, double(updates[f"unet.{name}"]), rtol=1e-9, atol=1e-9)
            before.pop(name)
    assert not before, "diffusers did not load these"


def test_every_sdxl_name_is_the_module_that_diffusers_takes_it_for():
    from types import SimpleNamespace

    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    from diffusers.utils import convert_unet_state_dict_to_peft

    keys = {
        p.key for m, p in names.places("sdxl").items() if m.startswith("unet.") and len(names.shapes("sdxl")[m]) > 1
    }
    made = {}
    for i, key in enumerate(sorted(keys), start=1):
        kernel = names.shapes("sdxl")[names.modules_of("sdxl")[key][0]][2:]
        shapes = (
            ("lora_down.weight", (1, 2, *kernel)),
            ("lora_up.weight", (2, 1, *(1 for _ in kernel))),
            ("alpha", ()),
        )
        made |= {f"{key}.{suffix}": torch.full(shape, float(i)) for suffix, shape in shapes}
    ours = kohya.read("made", made, {})
    assert ours.metadata["model"] == "sdxl"
    mapped = conversion._maybe_map_sgm_blocks_to_diffusers(dict(made), SimpleNamespace(layers_per_block=2))
    theirs, _ = conversion._convert_non_diffusers_lora_to_diffusers(mapped)
    theirs = convert_unet_state_dict_to_peft(theirs)
    theirs = {
        k.removesuffix(".lora_A.weight").removesuffix(".down.weight"): t
        for k, t in theirs.items()
        if "up.w" not in k and "_B." not in k
    }
    assert len(ours.factors) == len(keys) == len(theirs)
    for module, f in ours.factors.items():
        assert theirs[module.replace(".lora", "")].flatten()[0] == f.A.flatten()[0], module


def test_flux_is_split_as_diffusers_splits_it():
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch.manual_seed(0)
    made = {}
    for key, out, width in (
        ("double_blocks_3_img_attn_qkv", 12, 4),
        ("double_blocks_3_txt_attn_qkv", 12, 4),
        ("double_blocks_3_img_mod_lin", 24, 4),
        ("double_blocks_3_txt_mlp_0", 16, 4),
        ("single_blocks_5_linear1", 21504, 2),
        ("single_blocks_5_linear2", 4, 5),
        ("single_blocks_5_modulation_lin", 12, 4),
        ("final_layer_linear", 4, 4),
        ("final_layer_adaLN_modulation_1", 8, 4),
        ("img_in", 4, 4),
        ("guidance_in_in_layer", 4, 4),
    ):
        alpha = 2.0 if "final" in key else 3.0  # diffusers drops the alpha of the last layer
        made |= {
            f"lora_unet_{key}.lora_down.weight": torch.randn(2, width).double(),
            f"lora_unet_{key}.lora_up.weight": torch.randn(out, 2).double(),
            f"lora_unet_{key}.alpha": torch.tensor(alpha),
        }
    ours = kohya.read("made", made, {})
    theirs = conversion._convert_kohya_flux_lora_to_diffusers(dict(made))
    theirs = {k if k.startswith("transformer.") else f"transformer.{k}": t for k, t in theirs.items()}
    assert {k.removesuffix(".lora_A.weight") for k in theirs if "lora_A" in k} == set(ours.factors)
    for module, f in ours.factors.items():
        torch.testing.assert_close(f.delta(), theirs[f"{module}.lora_B.weight"] @ theirs[f"{module}.lora_A.weight"])
    linear1 = [
        ours.factors[f"transformer.single_transformer_blocks.5.{m}"]
        for m in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert [f.B.shape[0] for f in linear1] == [3072, 3072, 3072, 12288]
    assert all((f.rank, f.alpha) == (2, 3.0) for f in linear1)


def test_the_halves_of_a_shift_and_scale_are_only_swapped_under_an_ldm_name():
    up = torch.arange(8.0).reshape(8, 1)
    for key, first in (("lora_unet_final_layer_adaLN_modulation_1", 4.0), ("lora_transformer_norm_out_linear", 0.0)):
        made = {
            f"{key}.lora_down.weight": torch.ones(1, 4),
            f"{key}.lora_up.weight": up,
            "lora_unet_img_in.diff": torch.ones(2, 2),
        }
        assert kohya.read("made", made, {}).factors["transformer.norm_out.linear"].B[0, 0] == first


def test_the_halves_of_a_bias_alone_are_swapped_with_those_of_its_weight(tmp_path):
    made = {
        "lora_unet_final_layer_adaLN_modulation_1.diff_b": torch.arange(6144.0),
        "lora_unet_img_in.diff": torch.ones(3072, 64),
    }
    adapter = kohya.read("made", made, {})
    assert adapter.updates["transformer.norm_out.linear"].bias[0] == 3072
    kohya.write(adapter, tmp_path / "x.safetensors")
    tensors, _ = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(tensors["lora_unet_final_layer_adaLN_modulation_1.diff_b"], torch.arange(6144.0))


@pytest.mark.parametrize("model", names.MODELS)
def test_the_model_is_told_from_the_keys(model, tmp_path):
    adapter = Adapter(CONFIG, {ONE[model]: factors(ONE[model], model)})
    kohya.write(adapter, tmp_path / "sdxl_flux.safetensors")
    again = read(tmp_path / "sdxl_flux.safetensors")
    assert again.metadata["model"] == model
    same(adapter, again)


def test_where_names_and_widths_fit_several_models_the_metadata_decides():
    key = "lora_unet_mid_block_resnets_0_conv1"
    made = {f"{key}.lora_down.weight": torch.ones(1, 4, 3, 3), f"{key}.lora_up.weight": torch.ones(4, 1, 1, 1)}
    for header, model in (
        ({}, "sd1"),
        ({"ss_v2": "True"}, "sd2"),
        ({"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    ):
        assert kohya.read("made", made, header).metadata["model"] == model


def test_sdxl_is_read_in_both_namings():
    module = ONE["sdxl"]
    for key in (
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k",
        "lora_unet_" + module.removeprefix("unet.").replace(".", "_"),
    ):
        made = {f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)}
        assert list(kohya.read("made", made, {}).factors) == [module]


def test_all_prefixes_are_read():
    made = {
        f"{key}.{suffix}": torch.ones(shape)
        for key in (
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "lycoris_single_blocks_0_linear2",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "lora_te1_encoder_layers_1_mlp_fc1",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        )
        for suffix, shape in (("lora_down.weight", (1, 4)), ("lora_up.weight", (4, 1)))
    }
    assert set(kohya.read("made", made, {}).factors) == {
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.proj_out",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    }


@st.composite
def adapters(draw):
    """A model, and updates of some of its modules: mixed ranks, alphas, precisions, kinds, in narrow widths."""
    model = draw(st.sampled_from(names.MODELS))
    places, shapes = names.places(model), names.shapes(model)
    candidates = [m for m in places if len(shapes[m]) > 1 and "norm1_context" not in m]
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4, unique=True))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    torch.manual_seed(draw(st.integers(0, 99)))
    found, done = {}, set()
    for module in chosen:
        place = places[module]
        if place.key in done:
            continue
        done.add(place.key)
        rank, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1.0, 3.0, 7.3]))
        first = factors(place.modules[0], model, rank, alpha, dtype, (6, 5))
        magnitude = torch.rand(6, 1).to(dtype) if draw(st.booleans()) else None
        # of the parts of a fused weight, each with its own down; otherwise all, and they share it
        some = draw(st.booleans())
        for i, part in enumerate(place.modules):
            if some and magnitude is None and len(place.modules) > 1:
                if i % 2 == 0:
                    own = factors(
                        part, model, rank + i, 1.0, dtype, (6 * shapes[part][0] // shapes[place.modules[0]][0], 5)
                    )
                    found[part] = replace(own, alpha=alpha * (rank + i))
                continue
            rows = 6 * shapes[part][0] // shapes[place.modules[0]][0]
            own = torch.randn(rows, *first.B.shape[1:]).to(dtype)
            made = replace(first, A=first.A.clone(), B=own) if i else first
            if magnitude is not None:
                made = Dora(made, torch.rand(rows, 1).to(dtype) if i else magnitude)
            found[part] = made
    return model, Adapter(CONFIG, found, metadata={"model": model, "recipe": {"steps": 10}})


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_what_is_written_is_read_back_bit_for_bit(tmp_path_factory, case):
    model, adapter = case
    path = tmp_path_factory.mktemp("kohya") / "a.safetensors"
    assert kohya.losses(adapter) == []
    kohya.write(adapter, path, bake_alpha=False)
    again = read(path)
    same(adapter, again)
    assert again.metadata["model"] == model
    assert again.metadata["recipe"] == {"steps": 10}
    for module, f in again.factors.items():
        assert again.config.rank_of(module) == f.rank
        assert again.config.alpha_of(module) == f.alpha == pytest.approx(adapter.factors[module].alpha, rel=1e-11)


@pytest.mark.parametrize("kind", ["loha", "lokr", "diff"])
def test_the_parts_of_a_fused_lycoris_update_come_back_as_one(kind, tmp_path):
    torch.manual_seed(0)
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    parts = {
        "loha": {f"hada_w{i}_{x}": torch.randn(s).double() for i in "12" for x, s in (("a", (12, 2)), ("b", (2, 4)))},
        "lokr": {"lokr_w1": torch.randn(6, 2).double(), "lokr_w2": torch.randn(2, 2).double()},
        "diff": {"diff": torch.randn(12, 4).double(), "diff_b": torch.randn(12).double()},
    }[kind]
    alpha = {} if kind == "diff" else {f"{key}.alpha": torch.tensor(2.0)}
    made = {f"{key}.{suffix}": t for suffix, t in parts.items()} | alpha
    adapter = kohya.read("made", made, {})
    assert [m.rsplit(".", 1)[1] for m in adapter.updates] == ["to_q", "to_k", "to_v"]
    whole = {"loha": Loha, "lokr": Lokr, "diff": Dense}[kind]
    fused = lycoris.update("k", {k.split(".", 1)[1]: t for k, t in made.items()}, (12, 4))
    assert isinstance(fused, whole)
    torch.testing.assert_close(torch.cat([u.delta() for u in adapter.updates.values()]), fused.delta())
    kohya.write(adapter, tmp_path / "a.safetensors")
    written, _ = read_tensors(tmp_path / "a.safetensors")
    assert written.keys() == made.keys()
    assert all(torch.equal(written[k], made[k].to(written[k].dtype)) for k in made)


def test_parts_of_a_fused_weight_that_share_nothing_become_blocks_of_one(tmp_path):
    torch.manual_seed(0)
    here = "transformer.single_transformer_blocks.0"
    parts = {
        f"{here}.attn.to_q": Factors(torch.randn(2, 4), torch.randn(4, 2), 3.0),
        f"{here}.attn.to_v": Factors(torch.randn(3, 4), torch.randn(4, 3), 1.0),
        f"{here}.proj_mlp": Factors(torch.randn(1, 4), torch.randn(16, 1), 7.0, rslora=True),
    }
    kohya.write(Adapter(CONFIG, parts), tmp_path / "a.safetensors")
    written, _ = read_tensors(tmp_path / "a.safetensors")
    assert written["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (6, 4)
    again = read(tmp_path / "a.safetensors")
    assert {m: f.rank for m, f in again.factors.items()} == {m: f.rank for m, f in parts.items()}
    for module, f in parts.items():
        torch.testing.assert_close(double(again.factors[module]), double(f), rtol=1e-6, atol=1e-6)


def test_scales_that_are_not_alpha_over_r_are_written_as_the_alpha_that_is(tmp_path):
    module = ONE["sd1"]
    f = replace(factors(module, "sd1", 3, 5.0), rslora=True)
    kohya.write(Adapter(CONFIG, {module: f}), tmp_path / "a.safetensors")
    again = read(tmp_path / "a.safetensors").factors[module]
    assert again.scale == pytest.approx(f.scale, rel=1e-15)
    torch.testing.assert_close(double(again), double(f), rtol=1e-14, atol=1e-14)


def test_baked_alphas_are_the_ranks_and_the_change_is_the_same(tmp_path):
    module = ONE["sd1"]
    f = factors(module, "sd1", 3, 5.0)
    kohya.write(Adapter(CONFIG, {module: f}), tmp_path / "a.safetensors", bake_alpha=True)
    again = read(tmp_path / "a.safetensors").factors[module]
    assert again.alpha == again.rank == 3
    torch.testing.assert_close(double(again), double(f), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "pairs, alphas",
    [
        (((4, 2.0), (4, 2.0)), {2.0}),  # as they are
        (((4, 2.0), (2, 2.0)), {2.0}),
        (((4, 2.0), (4, 3.0)), {4.0}),  # one rank: alpha says it, for programs that take a missing alpha for 1
        (((4, 2.0), (2, 3.0)), set()),
        (((4, 2.0), (3, 3.0), (3, 3.0)), set()),
    ],
)
def test_alphas_that_differ_within_a_component_go_into_the_factors(pairs, alphas, tmp_path):
    names_ = ("to_q", "to_k", "to_v")
    attention, other = ONE["sd1"].removesuffix("to_k"), "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    updates = {f"{attention}{n}": factors(f"{attention}{n}", "sd1", r, a) for n, (r, a) in zip(names_, pairs)}
    updates[other] = factors(other, "sd1", 4, 7.0)  # another component, of one alpha
    kohya.write(Adapter(CONFIG, updates), tmp_path / "a.safetensors")
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    found = {float(t) for key, t in tensors.items() if key.endswith(".alpha") and key.startswith("lora_unet_")}
    assert found == alphas
    again = read(tmp_path / "a.safetensors")
    for module, f in updates.items():
        torch.testing.assert_close(double(again.factors[module]), double(f), rtol=1e-6, atol=1e-6)
    assert again.factors[other].alpha == 7.0


def test_the_file_has_kohyas_suffixes_shapes_and_alphas(tmp_path):
    linear, conv, one = ONE["sd1"], "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.attentions.0.proj_in"
    adapter = Adapter(
        CONFIG,
        {m: factors(m, "sd1", dtype=torch.float16) for m in (linear, conv)}
        | {one: Factors(torch.randn(4, 320).half(), torch.randn(320, 4).half(), 2.0)},
    )
    kohya.write(adapter, tmp_path / "a.safetensors")
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    expected = {
        "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": ((4, 768), (320, 4)),
        "down_blocks_0_resnets_0_conv1": ((4, 320, 3, 3), (320, 4, 1, 1)),
        "down_blocks_0_attentions_0_proj_in": ((4, 320, 1, 1), (320, 4, 1, 1)),
    }
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == {
        f"lora_unet_{key}.{suffix}": (shape, torch.float16)
        for key, (down, up) in expected.items()
        for suffix, shape in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", ()))
    }


def test_learned_tokens_that_came_along_are_read_and_saved_weights_are_refused(tmp_path):
    key = "lora_unet_conv_in"
    made = {f"{key}.diff": torch.ones(320, 4, 3, 3), "bundle_emb.cat.string_to_param.*": torch.ones(2, 768)}
    adapter = kohya.read("made", made, {})
    assert {token: tuple(t.shape) for token, t in adapter.embeddings.items()} == {"cat": (2, 768)}
    adapter = replace(adapter, saved={"unet.conv_in.bias": torch.ones(320)})
    (lost,) = kohya.losses(adapter)
    assert "unet.conv_in.bias" in lost
    with pytest.raises(AdapterError, match=r"conv_in\.bias"):
        kohya.write(adapter, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module, kind, said",
    [
        ("model.layers.0.self_attn.q_proj", {}, "no name for it"),
        ("unet.conv_inn", {}, "did you mean 'unet.conv_in'"),
        (ONE["sd1"], {"kind": "embedding"}, "an embedding"),
        (ONE["sd1"], {"transposed": True}, "a transposed weight"),
    ],
)
def test_what_has_no_place_in_the_format_is_a_loss(module, kind, said):
    adapter = Adapter(CONFIG, {module: Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0, **kind)})
    assert said in " ".join(kohya.losses(adapter))


def test_an_unknown_key_is_named_with_the_nearest_name():
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_qq"
    made = {f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)}
    with pytest.raises(AdapterError, match=f"{key}.lora_down.weight.*did you mean '{key[:-1]}'"):
        kohya.read("file.safetensors", made, {})


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"lora_unet_conv_in.lora_up.weight": torch.full((4, 1, 1, 1), torch.nan)},
            "lora_unet_conv_in'?: B holds 4 values",
        ),
        ({"lora_unet_conv_in.alpha": torch.tensor(-1.0)}, "lora_unet_conv_in.*alpha is -1"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2, 1, 1)}, "lora_unet_conv_in"),
        (
            {"lora_unet_input_blocks_0_0.diff": torch.ones(4, 4, 3, 3)},
            "'lora_unet_conv_in' and 'lora_unet_input_blocks_0_0'",
        ),
        ({"unet.conv_in.lora_A.weight": torch.ones(1, 4)}, "unet.conv_in.lora_A.weight"),
        ({"lora_unet_conv_in": torch.ones(1, 4)}, "'lora_unet_conv_in' is not one"),
        ({"lora_unet_conv_in.lora_C.weight": torch.ones(1, 4)}, "lora_unet_conv_in.lora_C.weight"),
    ],
)
def test_a_malformed_file_is_refused_with_its_name_and_the_keys(change, said):
    made = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 1, 1, 1),
    }
    with pytest.raises(AdapterError, match=f"(?s)^file.safetensors: .*{said}"):
        kohya.read("file.safetensors", made | change, {})


def test_a_lokr_whose_blocks_the_parts_cut_through_becomes_plain_factors():
    torch.manual_seed(0)
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    w1, a, b = torch.randn(2, 2), torch.randn(6, 1), torch.randn(1, 2)
    made = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b, f"{key}.alpha": torch.tensor(0.5)}
    found = kohya.read("made", made, {}).factors
    torch.testing.assert_close(torch.cat([f.delta() for f in found.values()]), 0.5 * torch.kron(w1, a @ b))


def test_a_lokr_of_whole_factors_whose_blocks_the_parts_cut_through_is_refused():
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    made = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(6, 2)}
    with pytest.raises(AdapterError, match=f"{key}.*blocks of 6 rows"):
        kohya.read("file.safetensors", made, {})


def test_fits_knows_its_own():
    assert kohya.fits(["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"])
    for other in (
        "unet.conv_in.lora_A.weight",
        "unet:0:up",
        "base_model.model.x.lora_A.weight",
        "layers.0.lora_a",
        "lora_unet_x",
    ):
        assert not kohya.fits([other])


def test_names_are_patterns_of_themselves_only():
    modules = [m for m in names.shapes("sd1") if "attn1.to_q" in m][:3]
    made = {}
    for i, module in enumerate(modules):
        key = names.places("sd1")[module].key
        made |= {
            f"{key}.lora_down.weight": torch.ones(1 + (i > 1), 4),
            f"{key}.lora_up.weight": torch.ones(4, 1 + (i > 1)),
        }
    config = kohya.read("made", made, {}).config
    assert (config.rank, config.rank_pattern) == (1, {f"^{re.escape(modules[2])}": 2})
    assert config.targets == ["to_q"]
