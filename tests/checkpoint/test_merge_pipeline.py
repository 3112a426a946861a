"""Merging into diffusers pipelines on disk, against diffusers' own `fuse_lora` and float64."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pipelines as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.fingerprint import fingerprint
from lorakit.adapter.lora import Factors
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, LorakitError, TargetError
from lorakit.formats import kohya, names
from lorakit.ops.quantized import blockwise

MODELS = ("sd1", "sdxl", "flux", "sd3")
NOTE = "lorakit_merge.json"


def by_diffusers(name: str) -> bool:
    """What its `load_lora_weights` takes: of the text encoders CLIP's layers."""
    return not name.startswith("text_encoder") or ".encoder.layers." in name


def saved(pipe, folder: Path, **options) -> Path:
    pipe.save_pretrained(folder, **options)
    (folder / "README.md").write_text("of the base")
    return folder


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    pipe = tiny.pipeline("sd1")
    return pipe, saved(pipe, tmp_path_factory.mktemp("pipeline") / "sd1")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def file_name(name: str, tensors) -> str:
    """A parameter of an adapter's component in a file, which may lack the level `text_model.`."""
    return name if name in tensors else name.removeprefix("text_model.")


def assert_merged(
    base: Path, out: Path, adapter: lk.Adapter, weight: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Every changed weight is the exact one, rounded once; every other tensor and file is the base's to the byte."""
    before, after = files(base), files(out)
    touched = {name.partition(".")[0] for name in adapter.updates}
    assert set(after) == {*before, NOTE}
    assert all(
        after[n] == data
        for n, data in before.items()
        if not (n.split("/")[0] in touched and n.endswith((".safetensors", ".index.json")))
    )
    changed = 0
    for component in touched:
        old, new = tiny.stored(base / component), tiny.stored(out / component)
        updates = {
            file_name(f"{n.removeprefix(f'{component}.')}.weight", old): u
            for n, u in adapter.updates.items()
            if n.startswith(f"{component}.")
        }
        assert set(updates) <= set(old) == set(new)
        for name, tensor in old.items():
            assert new[name].dtype == (dtype or tensor.dtype)
            if name in updates:
                changed += 1
                expected = tensor.double() + weight * tiny.exact(updates[name], tensor)
                assert not new[name].equal(tensor), name
                torch.testing.assert_close(
                    new[name].double(), expected, **tiny.rounding(new[name].dtype), msg=lambda m, n=name: f"{n}: {m}"
                )
            else:
                assert new[name].view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
    assert changed == len(adapter.updates)


@pytest.mark.parametrize("model", MODELS)
def test_the_merged_pipeline_is_the_one_with_the_adapter_fused_by_diffusers(model, tmp_path):
    """Linear and convolution (LoCon) in the denoiser, CLIP's layers in the text encoders, mixed ranks and alphas."""
    pipe = tiny.pipeline(model)
    base = saved(pipe, tmp_path / "base")
    adapter = tiny.low_rank(tiny.targets(tiny.models(pipe), by_diffusers))
    adapter.save(tmp_path / "lora", "diffusers")
    report = merge_checkpoint(base, tmp_path / "lora", tmp_path / "out")
    assert len(report.targets) == len(adapter.factors)
    assert_merged(base, tmp_path / "out", adapter)

    plain = tiny.outputs(pipe)
    pipe.load_lora_weights(tmp_path / "lora")
    touched = sorted({name.partition(".")[0] for name in adapter.factors})
    pipe.fuse_lora(components=touched)
    pipe.unload_lora_weights()
    ours, theirs = tiny.outputs(tiny.loaded(type(pipe), tmp_path / "out")), tiny.outputs(pipe)
    for name, output in theirs.items():
        torch.testing.assert_close(ours[name], output, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert name not in touched or (output - plain[name]).abs().max() > 0.05


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_kohya_file_with_its_strength_in_the_factors_is_the_same_in_diffusers(model, tmp_path):
    """diffusers mistakes alphas that differ from module to module in this format, so that they are not left to it."""
    pipe = tiny.pipeline(model)
    if model == "sd1":
        pipe.register_modules(unet=tiny.sd1_unet().eval())
    base = saved(pipe, tmp_path / "base")
    linears = {
        n: w
        for n, w in tiny.targets(tiny.models(pipe), by_diffusers).items()
        if w.dim() == 2 and n in names.shapes(model)
    }
    adapter = tiny.low_rank(
        {n: w for n, w in linears.items() if ".attn" in n or "self_attn" in n or ".ff." in n or ".mlp." in n}
    )
    kohya.write(adapter, tmp_path / "lora.safetensors", bake_alpha=True)
    merge_checkpoint(base, tmp_path / "lora.safetensors", tmp_path / "out")
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora(components=sorted({name.partition(".")[0] for name in adapter.factors}))
    pipe.unload_lora_weights()
    ours = tiny.outputs(tiny.loaded(type(pipe), tmp_path / "out"))
    for name, output in tiny.outputs(pipe).items():
        torch.testing.assert_close(ours[name], output, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "variant", "sharded", "sharded variant"])
def test_each_way_of_storing_a_pipeline_keeps_its_files_and_precision(kind, sd1, tmp_path):
    pipe = sd1[0] if kind == "fp32" else tiny.pipeline("sd1").to(torch.bfloat16 if kind == "bf16" else torch.float16)
    options = ({"variant": "fp16"} if "variant" in kind else {}) | (
        {"max_shard_size": "20KB"} if "sharded" in kind else {}
    )
    base = saved(pipe, tmp_path / "base", **options)
    unet = sorted(p.name for p in (base / "unet").iterdir())
    assert (
        len(unet) > 3
        if "sharded" in kind
        else unet == ["config.json", f"diffusion_pytorch_model{'.fp16' * ('variant' in kind)}.safetensors"]
    )
    adapter = tiny.low_rank(tiny.targets(tiny.models(pipe)))
    merge_checkpoint(base, adapter, tmp_path / "out", weights=[0.7])
    assert_merged(base, tmp_path / "out", adapter, weight=0.7)
    for index in (base / "unet").glob("*.index*.json"):
        ours = json.loads((tmp_path / "out/unet" / index.name).read_text())
        assert ours == json.loads(index.read_text())
    read = tiny.loaded(
        type(pipe), tmp_path / "out", torch_dtype=pipe.unet.dtype, **({"variant": "fp16"} if "variant" in kind else {})
    )
    assert read.unet.state_dict()["conv_in.weight"].equal(tiny.stored(tmp_path / "out/unet")["conv_in.weight"])


def test_a_text_encoder_whose_files_have_the_level_text_model_as_the_published_ones_do(sd1, tmp_path):
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    encoder = base / "text_encoder/model.safetensors"
    save_file({f"text_model.{name}": t for name, t in load_file(encoder).items()}, encoder, {"format": "pt"})
    adapter = tiny.low_rank(tiny.targets({"text_encoder": pipe.text_encoder}))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_merged(base, tmp_path / "out", adapter)


@pytest.mark.parametrize("model", ["sd1", "flux"])
def test_loha_lokr_and_whole_updates_change_each_weight_by_their_delta(model, tmp_path):
    pipe = tiny.pipeline(model)
    base = saved(pipe, tmp_path / "base")
    adapter = tiny.of_other_kinds(tiny.targets(tiny.models(pipe)))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_merged(base, tmp_path / "out", adapter)


def test_a_dora_merges_as_diffusers_fuses_it(sd1, tmp_path):
    pipe, base = tiny.pipeline("sd1"), sd1[1]
    adapter = tiny.low_rank(tiny.targets(tiny.models(pipe), by_diffusers), dora=True)
    adapter.save(tmp_path / "dora", "diffusers")
    merge_checkpoint(base, tmp_path / "dora", tmp_path / "out")
    assert_merged(base, tmp_path / "out", adapter)
    pipe.load_lora_weights(tmp_path / "dora")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unload_lora_weights()
    ours = tiny.stored(tmp_path / "out/unet")
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_several_adapters_with_weights_are_diffusers_weighted_adapters(sd1, tmp_path):
    pipe, base = tiny.pipeline("sd1"), sd1[1]
    weights = tiny.targets(tiny.models(pipe), by_diffusers)
    attention = {name: w for name, w in weights.items() if ".attn" in name or "self_attn" in name}
    made = [tiny.low_rank(weights, seed=1), tiny.low_rank(attention, seed=2)]
    for i, adapter in enumerate(made):
        adapter.save(tmp_path / f"lora{i}", "diffusers")
    merge_checkpoint(base, [tmp_path / "lora0", tmp_path / "lora1"], tmp_path / "out", weights=[0.8, -0.5])
    for i in range(2):
        pipe.load_lora_weights(tmp_path / f"lora{i}", adapter_name=f"a{i}")
    pipe.set_adapters(["a0", "a1"], [0.8, -0.5])
    pipe.fuse_lora(components=["unet", "text_encoder"], adapter_names=["a0", "a1"])
    pipe.unload_lora_weights()
    ours = tiny.stored(tmp_path / "out/unet")
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_bias_and_a_norm_that_a_whole_update_changes(sd1, tmp_path):
    pipe, base = sd1
    names = ("unet.conv_in", "unet.conv_norm_out", "text_encoder.text_model.encoder.layers.0.layer_norm1")
    sizes = (pipe.unet.conv_in.weight.shape, pipe.unet.conv_norm_out.weight.shape, (12,))
    others = {
        n: Dense(torch.full(tuple(s), 0.25), torch.full((s[0],), -0.5)) for n, s in zip(names, sizes, strict=True)
    }
    merge_checkpoint(base, lk.Adapter(lk.LoraConfig(rank=1, alpha=1), others), tmp_path / "out", weights=[2.0])
    for component in ("unet", "text_encoder"):
        old, new = tiny.stored(base / component), tiny.stored(tmp_path / "out" / component)
        changed = {n for n, t in old.items() if not new[n].equal(t)}
        mine = {n.removeprefix(f"{component}.") for n in names if n.startswith(component)}
        assert changed == {file_name(f"{n}.{kind}", old) for n in mine for kind in ("weight", "bias")}
        for name in changed:
            torch.testing.assert_close(new[name], old[name] + (0.5 if name.endswith("weight") else -1.0))


def test_another_precision_is_written_to_every_component_and_loads(sd1, tmp_path):
    pipe, base = sd1
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float16)
    for component in ("unet", "text_encoder", "vae"):
        floats = [t for t in tiny.stored(tmp_path / "out" / component).values() if t.is_floating_point()]
        assert floats
        assert {t.dtype for t in floats} == {torch.float16}
    plain, read = tiny.stored(base / "vae"), tiny.loaded(type(pipe), tmp_path / "out", torch_dtype=torch.float16)
    assert all(t.equal(plain[name].half()) for name, t in read.vae.state_dict().items())


def test_only_the_components_that_the_adapter_changes_are_opened(sd1, tmp_path):
    """An encoder stored as a pickle does not keep an adapter out of the denoiser; its file is carried along."""
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    (base / "text_encoder/model.safetensors").unlink()
    (base / "text_encoder/pytorch_model.bin").write_bytes(b"a pickle, never opened")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_merged(base, tmp_path / "out", adapter)
    both = tiny.low_rank(tiny.targets(tiny.models(pipe)))
    with pytest.raises(LorakitError, match="pickles"):
        merge_checkpoint(base, both, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def refused(base: Path, adapter, out: Path, kind=LorakitError, **options) -> str:
    """The message; nothing was written, not even beside OUT, and the base is as it was."""
    before, around = files(base), sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(kind) as caught:
        merge_checkpoint(base, adapter, out, **options)
    assert files(base) == before
    assert sorted(p.name for p in out.parent.iterdir()) == around
    return str(caught.value)


def one(name: str, out: int = 8, inside: int = 8) -> lk.Adapter:
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=2), {name: Factors(torch.ones(2, inside), torch.ones(out, 2), 2.0)})


def test_an_adapter_for_what_the_pipeline_lacks_is_refused(sd1, tmp_path):
    _, base = sd1
    said = refused(base, one("text_encoder_2.text_model.encoder.layers.0.mlp.fc1"), tmp_path / "out", TargetError)
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1" in said
    assert "unet" in said
    said = refused(base, one("model.layers.0.self_attn.q_proj"), tmp_path / "out", TargetError)
    assert "model.layers.0.self_attn.q_proj" in said
    assert "another model" in said
    said = refused(base, one("transformer.single_transformer_blocks.0.proj_mlp"), tmp_path / "out", TargetError)
    assert "transformer" in said
    assert "attentions.7" in refused(
        base, one("unet.down_blocks.0.attentions.7.proj_in"), tmp_path / "out", TargetError
    )
    assert "which is in no component" in refused(base, one("vae_of_mine.conv"), tmp_path / "out", TargetError)


def test_an_adapter_of_other_widths_is_refused_with_both_shapes(sd1, tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    said = refused(sd1[1], one(name, 320, 320), tmp_path / "out", AdapterError)
    assert "[12, 12]" in said
    assert "[320, 320]" in said
    assert "mid_block" in said


def test_a_components_own_folder_takes_what_the_adapter_has_for_it(sd1, tmp_path):
    """It holds the component's own names; the adapter's begin with the component."""
    pipe, base = sd1
    shutil.copytree(base / "unet", tmp_path / "unet")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}))
    merge_checkpoint(tmp_path / "unet", adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "pipeline")
    ours, theirs = tiny.stored(tmp_path / "out"), tiny.stored(tmp_path / "pipeline/unet")
    assert all(ours[name].equal(t) for name, t in theirs.items())
    assert "down_blocks" in refused(
        tmp_path / "unet", one("model.layers.0.self_attn.q_proj"), tmp_path / "other", TargetError
    )


def test_a_module_that_the_component_lacks_is_not_put_into_a_like_one(tmp_path):
    """A UNet without attention in its middle, and an adapter for just that: not the one other block's attention is
    meant.
    """
    pipe = tiny.pipeline("sd1")
    torch.manual_seed(0)
    pipe.unet = tiny.small_unet(mid_block_type="UNetMidBlock2D", up_block_types=("UpBlock2D", "UpBlock2D"))
    base = saved(pipe, tmp_path / "base")
    said = refused(base, one("unet.mid_block.attentions.0.proj_in"), tmp_path / "out", TargetError)
    assert "mid_block.attentions.0.proj_in" in said


def test_quantized_components_are_refused(sd1, tmp_path):
    pipe, _ = sd1
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    base = saved(pipe, tmp_path / "fp8")
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(weights).items()}, weights)
    said = refused(base, adapter, tmp_path / "out")
    assert "F8_E4M3" in said
    assert "unquantized base" in said
    base = saved(pipe, tmp_path / "nf4")
    config = json.loads((base / "unet/config.json").read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes"}
    }
    (base / "unet/config.json").write_text(json.dumps(config))
    assert "quantized (bitsandbytes)" in refused(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("requantize", [None, "same"])
def test_a_component_quantized_in_4_bits_is_dequantized_or_quantized_again(requantize, sd1, tmp_path):
    pipe, original = sd1
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_" in name))
    for name in ("nf4", "dense"):
        shutil.copytree(original, tmp_path / name)
    dense = load_file(original / "unet/diffusion_pytorch_model.safetensors")
    packed = dict(dense)
    for name in [n for n in dense if ".attn1.to_q.weight" in n]:
        made = blockwise.quantized(packed.pop(name), blockwise.Blockwise("nf4", dtype=torch.float32))
        packed |= {f"{name.removesuffix('.weight')}.{own}": tensor for own, tensor in made.items()}
        dense[name] = blockwise.dequantized(made)
    for folder, tensors in (("nf4", packed), ("dense", dense)):
        save_file(tensors, tmp_path / folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((original / "unet/config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "nf4/unet/config.json").write_text(json.dumps(config | {"quantization_config": how}))
    if requantize is None:
        for name in ("nf4", "dense"):
            merge_checkpoint(tmp_path / name, adapter, tmp_path / f"{name}-out", dtype=torch.float32)
        first, second = (tmp_path / f"{name}-out" / "unet" for name in ("nf4", "dense"))
        ours, expected = (load_file(each / "diffusion_pytorch_model.safetensors") for each in (first, second))
        assert all(torch.equal(ours[n], expected[n]) for n in expected)
        assert "quantization_config" not in json.loads((first / "config.json").read_text())
        diffusers.UNet2DConditionModel.from_pretrained(first)
        return
    report = merge_checkpoint(
        tmp_path / "nf4", adapter, tmp_path / "out", requantize=requantize, onto=tmp_path / "dense", keep_at_least=0
    )
    assert {each.module for each in report.requantized} == {each.module for each in report.differences}
    assert all(each.module.startswith("unet.") for each in report.requantized)
    written = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert written.keys() == packed.keys()
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["quantization_config"] == how


def test_out_must_be_new_and_outside_the_base(sd1, tmp_path):
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert "exists" in refused(base, adapter, taken)
    assert (taken / "mine.txt").read_text() == "mine"
    assert "inside the base" in refused(base, adapter, base / "merged")
    assert "inside the base" in refused(base, adapter, base / "unet/merged")
    assert "the base itself" in refused(base, adapter, base, force=True)
    assert "holds the base" in refused(base, adapter, tmp_path, force=True)
    assert "holds no checkpoint, but mine.txt" in refused(base, adapter, taken, force=True)
    for _ in range(2):
        merge_checkpoint(base, adapter, tmp_path / "out", force=True)
    assert_merged(base, tmp_path / "out", adapter)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda base: (base / "unet/config.json").unlink(), "which is in no component"),
        (lambda base: (base / "unet/diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
        (lambda base: (base / "model_index.json").write_text("[1, 2]"), "model_index.json"),
        (lambda base: (base / "model_index.json").write_text("{"), "model_index.json"),
        (
            lambda base: (base / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100),
            "not a sound safetensors file",
        ),
    ],
    ids=["no config", "no weights", "a list", "no json", "no safetensors"],
)
def test_a_damaged_pipeline_is_refused_by_name(damage, said, sd1, tmp_path):
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    damage(base)
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    assert said in refused(base, adapter, tmp_path / "out")


def test_a_component_whose_factors_are_zero_keeps_none_of_the_others_out(sd1, tmp_path):
    pipe, base = sd1
    adapter = tiny.low_rank(tiny.targets(tiny.models(pipe), lambda name: ".to_q" in name or "q_proj" in name))
    zero = {n: replace(f, B=f.B * 0) if n.startswith("text_encoder") else f for n, f in adapter.factors.items()}
    merge_checkpoint(base, replace(adapter, updates=zero), tmp_path / "out")
    assert_merged(
        base, tmp_path / "out", replace(adapter, updates={n: f for n, f in zero.items() if n.startswith("unet")})
    )


def test_another_precision_is_said_in_the_configs_of_the_components_that_say_one(tmp_path):
    pipe = tiny.pipeline("sd1").to(torch.float16)
    base = saved(pipe, tmp_path / "base", variant="fp16")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in tiny.loaded(type(pipe), tmp_path / "out").text_encoder.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "out/unet/config.json").read_text()) == json.loads(
        (base / "unet/config.json").read_text()
    )


def test_a_component_that_is_a_link_is_part_of_the_pipeline(sd1, tmp_path):
    pipe, plain = sd1
    base = saved(pipe, tmp_path / "base")
    for part in ("vae", "unet"):
        shutil.move(base / part, tmp_path / f"cached_{part}")
        (base / part).symlink_to(tmp_path / f"cached_{part}")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_merged(plain, tmp_path / "out", adapter)
    assert (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").is_file()
    (base / "vae/loop").symlink_to(base)
    assert "link to a folder that it is in" in refused(base, adapter, tmp_path / "again")


def test_another_pipeline_of_the_same_shapes_is_noticed_by_the_fingerprint(sd1, tmp_path):
    pipe, base = sd1
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    numbers = fingerprint({f"unet.{n}": p for n, p in pipe.unet.named_parameters()}, "UNet2DConditionModel")
    known = replace(adapter, metadata={"fingerprint": numbers})
    merge_checkpoint(base, known, tmp_path / "out")
    other = {name: [v + 9 for v in values] for name, values in numbers["samples"].items()}
    strange = replace(adapter, metadata={"fingerprint": {**numbers, "samples": other}})
    assert "another base" in refused(base, strange, tmp_path / "again", AdapterError)
    # ... unless the adapter's base was quantized so coarsely that it may be this one
    within = {name: [10.0] * len(values) for name, values in numbers["samples"].items()}
    coarse = replace(adapter, metadata={"fingerprint": {**numbers, "samples": other, "rounding": within}})
    merge_checkpoint(base, coarse, tmp_path / "again")


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_component_is_a_folder_of_the_pipeline_and_no_other(name, sd1, tmp_path):
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "work/base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "UNet2DConditionModel"]}))
    for folder in (base.parent, base):
        shutil.copy(base / "unet/config.json", folder / "config.json")
        save_file({"conv_in.weight": torch.ones(2)}, folder / "model.safetensors")
    before = files(base.parent)
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    merge_checkpoint(base, adapter, tmp_path / "work/out", dtype=torch.float16)
    shutil.rmtree(tmp_path / "work/out")
    assert files(base.parent) == before


def test_an_index_that_names_a_path_outside_leads_nowhere(sd1, tmp_path):
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"../outside": ["diffusers", "UNet2DConditionModel"]}))
    shutil.copytree(base / "unet", tmp_path / "outside")
    before = files(tmp_path / "outside")
    adapter = replace(tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name)))
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float16)
    assert files(tmp_path / "outside") == before
    assert not (tmp_path / "out/../outside/lorakit_merge.json").exists()


def test_a_variant_beside_the_plain_file_is_left_out_and_named(sd1, tmp_path):
    """Two variants of one component would disagree after a merge into one of them."""
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    half = {n: t.half() for n, t in tiny.stored(base / "unet").items()}
    save_file(half, base / "unet/diffusion_pytorch_model.fp16.safetensors")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.left_out == ("unet/diffusion_pytorch_model.fp16.safetensors",)
    assert diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/unet").dtype == torch.float32


def test_the_weights_that_diffusers_reads_are_merged_whatever_lies_beside_them(sd1, tmp_path):
    """A stray model.safetensors is not what diffusers loads from a component of its own."""
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    stray = {n: torch.zeros_like(t) for n, t in tiny.stored(base / "unet").items()}
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}))
    merge_checkpoint(base, adapter, tmp_path / "expected")
    save_file(stray, base / "unet/model.safetensors")
    merge_checkpoint(base, adapter, tmp_path / "out")
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/unet").state_dict()
    assert all(read[name].equal(t) for name, t in tiny.stored(tmp_path / "expected/unet").items())


def test_other_copies_of_the_weights_are_left_out_as_they_would_be_unmerged(sd1, tmp_path):
    """As SDXL's own repository has them: the single file, other programs' weights, a second VAE that the pipeline does
    not name.
    """
    pipe, _ = sd1
    base = saved(pipe, tmp_path / "base")
    (base / "sd_whole.safetensors").write_bytes(b"a single file")
    (base / "unet/model.onnx").write_bytes(b"other weights")
    (base / "vae/flax_model.msgpack").write_bytes(b"of a component that is as it was")
    shutil.copytree(base / "vae", base / "vae_1_0")
    adapter = tiny.low_rank(tiny.targets({"unet": pipe.unet}, lambda name: ".attn1.to_q" in name))
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    kept = files(tmp_path / "out")
    assert {"sd_whole.safetensors", "unet/model.onnx"} <= set(report.left_out)
    assert not {"sd_whole.safetensors", "unet/model.onnx"} & set(kept)
    assert kept["vae/flax_model.msgpack"] == b"of a component that is as it was"
    assert tiny.loaded(type(pipe), tmp_path / "out").unet is not None
