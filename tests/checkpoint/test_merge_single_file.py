"""Merging into single files in the original code's names, against float64 and diffusers' own reading of them.

What is expected is the same file as `single_files` packs it from W + ΔW.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pipelines as tiny
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import DENOISER, MODELS, changed, made, pack, single_file, weights_of
from torch import Tensor

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.lora import Factors
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, LorakitError, TargetError


def assert_merged(base: Path, out: Path, expected: dict[str, Tensor]) -> None:
    """Every changed tensor is the exact one, rounded once;
    every other one, and the header's metadata, is the base's.
    """
    old, new = load_file(base), load_file(out)
    assert set(new) == set(old)
    for name, tensor in old.items():
        assert (new[name].dtype, new[name].shape) == (tensor.dtype, tensor.shape)
        if name in expected and not expected[name].equal(tensor.double()):
            assert not new[name].equal(tensor), name
            torch.testing.assert_close(
                new[name].double(), expected[name], **tiny.rounding(tensor.dtype), msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert new[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    with safe_open(base, "pt") as a, safe_open(out, "pt") as b:
        assert (a.metadata() or {}).items() <= b.metadata().items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_modules_rows_change_by_its_delta_and_nothing_else_does(model, dtype, tmp_path):
    """All linear layers and convolutions of the denoiser and the text encoders, with mixed ranks and alphas."""
    models = made(model)
    base = single_file(tmp_path / "base.safetensors", model, models, dtype)
    adapter = tiny.low_rank(tiny.targets(models))
    report = merge_checkpoint(base, adapter, tmp_path / "out.safetensors", weights=[0.7])
    assert_merged(base, tmp_path / "out.safetensors", pack(model, changed(weights_of(models), adapter, 0.7)))
    assert {t.module for t in report.targets} == set(adapter.factors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


@pytest.mark.parametrize("kind", ["dora", "others"])
@pytest.mark.parametrize("model", MODELS)
def test_dora_loha_lokr_and_whole_updates_of_rows_of_a_shared_tensor(model, kind, tmp_path):
    models = made(model)
    base = single_file(tmp_path / "base.safetensors", model, models)
    weights = tiny.targets(models)
    adapter = tiny.low_rank(weights, dora=True) if kind == "dora" else tiny.of_other_kinds(weights)
    merge_checkpoint(base, adapter, tmp_path / "out.safetensors")
    assert_merged(base, tmp_path / "out.safetensors", pack(model, changed(weights_of(models), adapter)))


@pytest.mark.parametrize(
    "model, modules",
    [
        ("sdxl", [f"text_encoder_2.text_model.encoder.layers.1.self_attn.{x}_proj" for x in "qkv"]),
        ("flux", [f"transformer.transformer_blocks.0.attn.{x}" for x in ("to_q", "to_k", "to_v", "add_k_proj")]),
        (
            "flux",
            [
                f"transformer.single_transformer_blocks.1.{x}"
                for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            ],
        ),
        (
            "sd3",
            [
                f"transformer.transformer_blocks.0.{x}"
                for x in ("attn.to_k", "attn.add_v_proj", "attn2.to_q", "norm1_context.linear")
            ],
        ),
        ("sd3", ["transformer.norm_out.linear", "transformer.transformer_blocks.1.norm1_context.linear"]),
    ],
)
def test_one_module_of_a_shared_tensor_leaves_the_others_rows_alone(model, modules, tmp_path):
    models = made(model)
    base = single_file(tmp_path / "base.safetensors", model, models)
    W = weights_of(models)
    for name in modules:
        adapter = tiny.low_rank({name: W[f"{name}.weight"]})
        merge_checkpoint(base, adapter, tmp_path / "out.safetensors", force=True)
        assert_merged(base, tmp_path / "out.safetensors", pack(model, changed(W, adapter)))


def test_sd1_and_sdxl_read_back_by_diffusers_give_the_same_pictures_noise(tmp_path):
    for model in ("sd1", "sdxl"):
        models = made(model)
        base = single_file(tmp_path / f"{model}.safetensors", model, models)
        adapter = tiny.low_rank(tiny.targets({"unet": models["unet"]}))
        merge_checkpoint(base, adapter, tmp_path / f"{model}-out.safetensors")
        read = theirs.convert_ldm_unet_checkpoint(
            load_file(tmp_path / f"{model}-out.safetensors"), models["unet"].config
        )
        found = made(model)["unet"]
        found.load_state_dict(read)
        expected = made(model)["unet"]
        expected.load_state_dict(
            {
                n.removeprefix("unet."): t.float()
                for n, t in changed(weights_of({"unet": models["unet"]}), adapter).items()
            }
        )
        ours, wanted, plain = (
            tiny.outputs(SimpleNamespace(components={"unet": u}))["unet"] for u in (found, expected, models["unet"])
        )
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - plain).abs().max() > 0.05


def test_sd3_read_back_by_diffusers_is_the_transformer_with_the_adapter(tmp_path):
    models = made("sd3")
    base = single_file(tmp_path / "base.safetensors", "sd3", models)
    adapter = tiny.low_rank(tiny.targets({"transformer": models["transformer"]}))
    merge_checkpoint(base, adapter, tmp_path / "out.safetensors")
    W, file = models["transformer"].state_dict(), load_file(tmp_path / "out.safetensors")
    for i in range(2):  # norms that no adapter changes, and that the converter asks for
        for side, (q, k) in {
            "x_block.attn": ("norm_q", "norm_k"),
            "context_block.attn": ("norm_added_q", "norm_added_k"),
        }.items():
            file |= {
                f"joint_blocks.{i}.{side}.ln_{x}.weight": W[f"transformer_blocks.{i}.attn.{n}.weight"]
                for x, n in (("q", q), ("k", k))
            }
    file |= {
        f"joint_blocks.0.x_block.attn2.ln_{x}.weight": W[f"transformer_blocks.0.attn2.norm_{x}.weight"] for x in "qk"
    }
    denoiser = {n.removeprefix(DENOISER): t for n, t in file.items() if n.startswith((DENOISER, "joint_blocks"))}
    read = theirs.convert_sd3_transformer_checkpoint_to_diffusers(denoiser | {"pos_embed": W["pos_embed.pos_embed"]})
    expected = changed(weights_of({"transformer": models["transformer"]}), adapter)
    assert set(read) == set(W)
    for name, tensor in read.items():
        torch.testing.assert_close(
            tensor.double(), expected[f"transformer.{name}"], atol=2e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_open_clips_projection_which_is_stored_across_changes_by_the_transposed_delta(tmp_path):
    models = made("sdxl")
    base = single_file(tmp_path / "base.safetensors", "sdxl", models)
    name, weight = "text_encoder_2.text_projection", models["text_encoder_2"].text_projection.weight
    whole = tiny.of_other_kinds(dict.fromkeys(("loha", "lokr", "diff"), weight))
    for i, adapter in enumerate(
        (
            tiny.low_rank({name: weight}),
            tiny.low_rank({name: weight}, dora=True),
            *(replace(whole, updates={name: u}) for u in whole.updates.values()),
        )
    ):
        merge_checkpoint(base, adapter, tmp_path / f"out{i}.safetensors")
        assert_merged(base, tmp_path / f"out{i}.safetensors", pack("sdxl", changed(weights_of(models), adapter)))


@pytest.mark.parametrize(
    "model, modules",
    [
        ("sd1", ("unet.conv_in", "unet.conv_norm_out", "text_encoder.text_model.encoder.layers.1.self_attn.k_proj")),
        (
            "sdxl",
            (
                "unet.add_embedding.linear_1",
                "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj",
                "text_encoder_2.text_model.final_layer_norm",
            ),
        ),
        (
            "flux",
            (
                "transformer.norm_out.linear",
                "transformer.single_transformer_blocks.1.proj_mlp",
                "transformer.transformer_blocks.0.attn.add_v_proj",
            ),
        ),
    ],
)
def test_biases_of_whole_updates_are_rows_of_the_shared_bias(model, modules, tmp_path):
    models = made(model)
    base = single_file(tmp_path / "base.safetensors", model, models)
    W, number = weights_of(models), torch.Generator().manual_seed(5)
    others = {
        m: Dense(
            torch.randn(W[f"{m}.weight"].shape, generator=number), torch.randn(W[f"{m}.bias"].shape, generator=number)
        )
        for m in modules
    }
    adapter = lk.Adapter(lk.LoraConfig(rank=1, alpha=1), others)
    merge_checkpoint(base, adapter, tmp_path / "out.safetensors", weights=[-0.5])
    assert_merged(base, tmp_path / "out.safetensors", pack(model, changed(W, adapter, -0.5)))


@pytest.mark.parametrize("model", ["sd1", "sdxl", "flux"])
def test_a_kohya_file_merges_into_the_single_file_it_was_trained_on(model, tmp_path):
    """Fused keys among them: the file that the adapter was saved as is what changes the weights."""
    models = made(model)
    base = single_file(tmp_path / "base.safetensors", model, models)
    adapter = tiny.low_rank({n: w for n, w in tiny.targets(models).items() if not n.startswith("text_encoder_2")})
    kept = lk.Adapter.load(adapter.save(tmp_path / "lora.safetensors", "kohya"))
    assert set(kept.factors) == set(adapter.factors)
    merge_checkpoint(base, tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    assert_merged(base, tmp_path / "out.safetensors", pack(model, changed(weights_of(models), adapter)))


def test_a_bare_denoiser_without_the_prefix_takes_its_part_and_refuses_the_encoders(tmp_path):
    models = made("flux")
    packed = pack("flux", weights_of(models))
    bare = {n.removeprefix(DENOISER): t.float().contiguous() for n, t in packed.items() if n.startswith(DENOISER)}
    save_file(bare, tmp_path / "base.safetensors")
    adapter = tiny.low_rank(tiny.targets(models, lambda n: n.startswith("transformer.")))
    merge_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    expected = {n.removeprefix(DENOISER): t for n, t in pack("flux", changed(weights_of(models), adapter)).items()}
    assert_merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", expected)
    whole = tiny.low_rank(tiny.targets(models))
    said = refused(tmp_path / "base.safetensors", whole, tmp_path / "again.safetensors", TargetError)
    assert "text_encoder.text_model" in said
    assert "it holds transformer of flux" in said


def test_several_adapters_add_up_with_their_weights(tmp_path):
    models = made("sdxl")
    base = single_file(tmp_path / "base.safetensors", "sdxl", models)
    weights = tiny.targets(models)
    attention = {n: w for n, w in weights.items() if "attn" in n}
    first, second = tiny.low_rank(weights, seed=1), tiny.of_other_kinds(attention)
    merge_checkpoint(base, [first, second], tmp_path / "out.safetensors", weights=[0.5, -1.5])
    W = weights_of(models)
    once = changed(W, first, 0.5)
    both = {n: once[n] + t - W[n] for n, t in changed(W, second, -1.5).items()}
    assert_merged(base, tmp_path / "out.safetensors", pack("sdxl", both))


def test_a_projection_stored_as_a_1x1_convolution_or_as_a_matrix_takes_either_form(tmp_path):
    models = made("sdxl")
    file = load_file(single_file(tmp_path / "base.safetensors", "sdxl", models))
    key, name = f"{DENOISER}input_blocks.4.1.proj_in.weight", "unet.down_blocks.1.attentions.0.proj_in"
    W = file[key].clone()
    assert W.dim() == 2
    linear = Factors(torch.ones(2, 8), torch.arange(16.0).reshape(8, 2), 1.0)
    conv = Factors(torch.ones(2, 8, 1, 1), torch.arange(16.0).reshape(8, 2, 1, 1), 1.0, "conv")
    for shape in ((8, 8), (8, 8, 1, 1)):
        save_file(file | {key: W.reshape(shape)}, tmp_path / "base.safetensors")
        for factors in (linear, conv):
            merge_checkpoint(
                tmp_path / "base.safetensors",
                lk.Adapter(lk.LoraConfig(rank=2, alpha=1), {name: factors}),
                tmp_path / "out.safetensors",
                force=True,
            )
            found = load_file(tmp_path / "out.safetensors")[key]
            torch.testing.assert_close(found, (W + 0.5 * linear.B @ linear.A).reshape(shape))


def refused(base: Path, adapter, out: Path, kind=LorakitError, **options) -> str:
    """The message; nothing was written, not even beside OUT, and the base is as it was."""
    before, around = base.read_bytes(), sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(kind) as caught:
        merge_checkpoint(base, adapter, out, **options)
    assert base.read_bytes() == before
    assert sorted(p.name for p in out.parent.iterdir()) == around
    return str(caught.value)


def test_a_file_of_another_model_or_of_other_widths_is_refused_with_what_it_is(tmp_path):
    models = made("sd1")
    base = single_file(tmp_path / "base.safetensors", "sd1", models)
    out = tmp_path / "out.safetensors"
    flux = tiny.low_rank(tiny.targets({"transformer": tiny.flux_transformer()}))
    said = refused(base, flux, out, TargetError)
    assert "sd1" in said
    assert "transformer." in said
    wide = Factors(torch.ones(2, 320), torch.ones(320, 2), 2.0)
    said = refused(
        base,
        lk.Adapter(
            lk.LoraConfig(rank=2, alpha=2), {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": wide}
        ),
        out,
        AdapterError,
    )
    assert "[12, 12]" in said
    assert "[320, 320]" in said
    language = lk.Adapter(lk.LoraConfig(rank=2, alpha=2), {"model.layers.0.self_attn.q_proj": wide})
    assert "model.layers.0.self_attn.q_proj" in refused(base, language, out, TargetError)
    whole = lk.Adapter(lk.LoraConfig(rank=2, alpha=2), {}, {"unet.conv_in.weight": torch.ones(4, 4, 3, 3)})
    assert "unet.conv_in.weight" in refused(base, whole, out)


def test_what_is_no_diffusion_checkpoint_is_refused_with_what_it_looks_like(tmp_path):
    adapter = tiny.low_rank(tiny.targets({"unet": made("sd1")["unet"]}, lambda n: "attn1" in n))
    out, base = tmp_path / "out.safetensors", tmp_path / "base.safetensors"
    save_file({n: t.contiguous() for n, t in made("sd1")["unet"].state_dict().items()}, base)
    assert "diffusers' names" in refused(base, adapter, out)
    adapter.save(tmp_path / "lora.safetensors", "kohya")
    assert "it is an adapter" in refused(tmp_path / "lora.safetensors", adapter, out)
    save_file(
        {"decoder.conv_in.weight": torch.ones(2, 2, 3, 3), "decoder.up.0.block.0.conv1.weight": torch.ones(2)}, base
    )
    assert "a VAE" in refused(base, adapter, out)
    base.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "not a sound safetensors file" in refused(base, adapter, out)
    pickle = tmp_path / "base.ckpt"
    torch.save({"state_dict": {}}, pickle)
    assert "is not a safetensors file" in refused(pickle, adapter, out)


def test_fp8_weights_are_refused_where_the_adapter_changes_them_and_carried_along_elsewhere(tmp_path):
    """Flux files have T5 in fp8 beside a bf16 transformer."""
    models = made("flux")
    file = load_file(single_file(tmp_path / "base.safetensors", "flux", models, torch.bfloat16))
    eight = {n: t.to(torch.float8_e4m3fn) if n.startswith("text_encoders.t5xxl.") else t for n, t in file.items()}
    base, out = tmp_path / "t5.safetensors", tmp_path / "out.safetensors"
    save_file(eight, base)
    adapter = tiny.low_rank(tiny.targets({"transformer": models["transformer"]}))
    merge_checkpoint(base, adapter, out)
    old, new = load_file(base), load_file(out)
    carried = [n for n in old if old[n].dtype == torch.float8_e4m3fn]
    assert carried
    assert all(new[n].view(torch.uint8).equal(old[n].view(torch.uint8)) for n in carried)
    save_file({n: t.to(torch.float8_e4m3fn) if t.dtype == torch.bfloat16 else t for n, t in file.items()}, base)
    said = refused(base, adapter, tmp_path / "again.safetensors")
    assert "F8_E4M3" in said
    assert "unquantized base" in said
    save_file(file | {f"{DENOISER}img_in.weight.absmax": torch.ones(2)}, base)
    assert "quantized" in refused(base, adapter, tmp_path / "again.safetensors")


def test_out_must_be_a_new_file_with_the_same_ending(tmp_path):
    models = made("sd1")
    base = single_file(tmp_path / "base.safetensors", "sd1", models)
    adapter = tiny.low_rank(tiny.targets({"unet": models["unet"]}, lambda n: "attn1" in n))
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    assert "exists" in refused(base, adapter, taken)
    assert taken.read_bytes() == b"mine"
    assert ".safetensors" in refused(base, adapter, tmp_path / "folder")
    assert "the base itself" in refused(base, adapter, base, force=True)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "is a folder" in refused(base, adapter, folder, force=True)
    merge_checkpoint(base, adapter, taken, force=True)
    assert_merged(base, taken, pack("sd1", changed(weights_of(models), adapter)))


def test_another_precision_is_written_throughout(tmp_path):
    models = made("sd1")
    base = single_file(tmp_path / "base.safetensors", "sd1", models)
    adapter = tiny.low_rank(tiny.targets({"unet": models["unet"]}))
    report = merge_checkpoint(base, adapter, tmp_path / "out.safetensors", dtype=torch.float16)
    assert report.converted
    expected, new = pack("sd1", changed(weights_of(models), adapter)), load_file(tmp_path / "out.safetensors")
    assert new["model_ema.num_updates"].equal(torch.tensor(7))
    for name, tensor in expected.items():
        assert new[name].dtype == torch.float16
        torch.testing.assert_close(new[name].double(), tensor, **tiny.rounding(torch.float16))


def test_hashes_of_the_bases_numbers_are_not_those_of_the_result(tmp_path):
    models = made("sd1")
    base = single_file(tmp_path / "base.safetensors", "sd1", models)
    save_file(load_file(base), base, {"modelspec.hash_sha256": "0x12", "modelspec.title": "tiny", "format": "pt"})
    merge_checkpoint(base, tiny.low_rank({"unet.conv_in": models["unet"].conv_in.weight}), tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["modelspec.title"], "modelspec.hash_sha256" in header) == ("tiny", False)
    assert str(tmp_path) not in header["lorakit_merge"]


def test_the_file_says_in_its_header_what_was_merged(tmp_path):
    models = made("sd1")
    base = single_file(tmp_path / "base.safetensors", "sd1", models)
    adapter = tiny.low_rank(tiny.targets({"unet": models["unet"]}, lambda n: "attn1" in n))
    merge_checkpoint(base, adapter, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.title"] == "tiny"
    assert "base.safetensors" in said["lorakit_merge"]
