"""A LoRA out of two checkpoints of a diffusion model: merged into the base again, it gives the tuned one."""

from __future__ import annotations

import shutil

import pipelines as tiny
import pytest
import single_files
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.checkpoint.extract import extract
from lorakit.checkpoint.pairs import _model_of
from lorakit.errors import LorakitError
from lorakit.formats import names


def changed(name: str) -> bool:
    """Some of everything: attention, convolutions, norms, biases, a text encoder."""
    return any(part in name for part in ("attn1.to_q", "conv1.", "norm2.", "ff.net.2", "fc1", "conv_in"))


def tune(folder) -> None:
    """A change of some parameters of full rank, in place."""
    made = torch.Generator().manual_seed(0)
    for file in folder.rglob("*.safetensors"):
        if file.parent.name in ("unet", "transformer", "text_encoder"):
            tensors = load_file(file)
            for name in filter(changed, tensors):
                tensors[name] += 0.05 * torch.randn(tensors[name].shape, generator=made)
            save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipes")
    tiny.pipeline("sd1").save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "tuned")
    tune(folder / "tuned")
    return folder


def test_what_is_extracted_from_a_pipeline_makes_the_base_the_tuned_one(pipes, tmp_path):
    done = extract(pipes / "base", pipes / "tuned", keep=1.0, save_rest=True)
    assert {m.module.partition(".")[0] for m in done.modules} == {"unet", "text_encoder"}
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in done.adapter.factors
    assert any("norm2.weight" in name for name in done.kept)
    path = done.adapter.save(tmp_path / "lora.safetensors", "kohya")
    merge_checkpoint(pipes / "base", path, tmp_path / "out")
    for part in ("unet", "text_encoder"):
        wanted, found, before = (tiny.stored(f / part) for f in (pipes / "tuned", tmp_path / "out", pipes / "base"))
        for name, tensor in wanted.items():
            # The bias of a module that has factors has no place beside them; the report says so.
            own = tiny.full_name(part, name)
            left_out = own in done.rest and own not in done.kept
            torch.testing.assert_close(found[name], before[name] if left_out else tensor, atol=2e-6, rtol=1e-5)
    assert all(name.endswith(".bias") for name in done.rest if name not in done.kept)


def test_tables_of_tokens_and_positions_which_no_adapter_changes_are_left_out_by_name(pipes, tmp_path):
    shutil.copytree(pipes / "base", tmp_path / "tuned")
    file = tmp_path / "tuned" / "text_encoder" / "model.safetensors"
    save_file({n: t + 0.1 if t.is_floating_point() else t for n, t in load_file(file).items()}, file, {"format": "pt"})
    done = extract(pipes / "base", tmp_path / "tuned", 2, save_rest=True)
    left = [n for n in done.rest if n not in done.kept]
    assert any("position_embedding" in n for n in left)
    assert any("token_embedding" in n for n in left)
    done.adapter.save(tmp_path / "lora.safetensors", "kohya")


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_a_pipeline_is_known_by_its_names_and_widths(model):
    shapes = {f"{module}.weight": shape for module, shape in names.shapes(model).items()}
    assert _model_of(shapes) == model
    assert _model_of({"unet.strange.weight": (4, 4)}) is None


def test_without_the_rest_the_share_that_is_captured_is_less(pipes):
    low, all_but_rest = extract(pipes / "base", pipes / "tuned", 2), extract(pipes / "base", pipes / "tuned", keep=1.0)
    assert 0 < low.captured < all_but_rest.captured < 1
    assert not low.kept
    assert max(m.rank for m in low.modules) == 2


@pytest.fixture(scope="module")
def files():
    """SD1's UNet and text encoder in the original code's names, before and after."""
    torch.manual_seed(0)
    W = {name: t.float() for name, t in single_files.weights_of(single_files.MODELS["sd1"]()).items()}
    made = torch.Generator().manual_seed(0)
    after = {name: t + 0.05 * torch.randn(t.shape, generator=made) if changed(name) else t for name, t in W.items()}
    return tuple({n: t.contiguous() for n, t in single_files.pack("sd1", w).items()} for w in (W, after))


def test_single_files_are_compared_module_by_module(files, tmp_path):
    base, tuned = files
    save_file(
        {**base, "model_ema.decay": torch.ones(1), "first_stage_model.a": torch.ones(2)}, tmp_path / "base.safetensors"
    )
    save_file({**tuned, "first_stage_model.a": torch.zeros(2)}, tmp_path / "tuned.safetensors")
    done = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", keep=1.0, save_rest=True)
    assert done.rest["first_stage_model.a"] == pytest.approx(2**0.5)
    assert "first_stage_model.a" not in done.kept
    assert {m.partition(".")[0] for m in done.adapter.factors} == {"unet", "text_encoder"}
    merge_checkpoint(tmp_path / "base.safetensors", done.adapter, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for name in (n for n in tuned if n.endswith("weight")):
        torch.testing.assert_close(found[name], tuned[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_rows_of_shared_tensors_and_swapped_halves_come_out_as_the_modules_have_them(model, tmp_path):
    torch.manual_seed(0)
    W = {name: t.float() for name, t in single_files.weights_of(single_files.MODELS[model]()).items()}
    wanted = ("norm_out.linear.weight", "attn.to_k.weight", "ff.net.2.weight")
    made = torch.Generator().manual_seed(0)
    after = {n: t + 0.05 * torch.randn(t.shape, generator=made) if n.endswith(wanted) else t for n, t in W.items()}
    for name, values in (("base", W), ("tuned", after)):
        save_file(
            {n: t.contiguous() for n, t in single_files.pack(model, values).items()}, tmp_path / f"{name}.safetensors"
        )
    done = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", keep=1.0)
    assert "transformer.norm_out.linear" in done.adapter.factors
    for module, f in done.adapter.factors.items():
        torch.testing.assert_close(f.delta(), after[f"{module}.weight"] - W[f"{module}.weight"], atol=1e-6, rtol=1e-5)


def test_what_does_not_go_together_is_refused(pipes, files, tmp_path):
    unet = files[0]
    save_file(unet, tmp_path / "file.safetensors")
    with pytest.raises(LorakitError, match=r"is a pipeline and .* a single file"):
        extract(pipes / "base", tmp_path / "file.safetensors", 2)
    lacking = {n: t for n, t in unet.items() if "middle_block.1.proj_in" not in n}
    save_file(lacking, tmp_path / "less.safetensors")
    with pytest.raises(LorakitError, match=r"only one of .* holds unet.mid_block.attentions.0.proj_in"):
        extract(tmp_path / "file.safetensors", tmp_path / "less.safetensors", 2)
    with pytest.raises(LorakitError, match="nothing differs"):
        extract(pipes / "base", pipes / "base", 2)
    shutil.copytree(pipes / "base", tmp_path / "no_text")
    shutil.rmtree(tmp_path / "no_text" / "text_encoder")
    with pytest.raises(LorakitError, match="has the component 'text_encoder'"):
        extract(pipes / "base", tmp_path / "no_text", 2)


def test_the_command_writes_a_kohya_file_of_a_diffusion_model(pipes, tmp_path, capsys):
    from lorakit.cli import run

    assert (
        run(["extract", str(pipes / "base"), str(pipes / "tuned"), str(tmp_path / "lora.safetensors"), "--rank", "2"])
        == 0
    )
    told = capsys.readouterr().out
    assert "other tensors changed: 0 saved in full" in told
    assert "lorakit inspect" in told.splitlines()[-1]
    assert lk.formats.format_of(tmp_path / "lora.safetensors") == "kohya"
