"""Pipelines from folders, single files and the hub's cache; what is no pipeline is refused by what it is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import tiny_pipelines as tiny
import torch
from safetensors.torch import save_file

from lorakit.bases.load import embedded_folder
from lorakit.bases.load_pipeline import embedded_pipeline, load_pipeline
from lorakit.errors import LorakitError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pipeline's folder whose index names a safety checker, as SD1's does; it has no weights here."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.tiny_sd1().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load(name, dtype=torch.float32):
    return load_pipeline(str(name), dtype, CPU)


def test_a_folder_is_the_pipeline_that_was_saved(saved, capfd):
    pipe = load(saved)
    said = capfd.readouterr()
    assert torch.equal(tiny.draw(pipe), tiny.draw(tiny.tiny_sd1()))
    assert pipe.safety_checker is None
    assert not any(c.training for c in pipe.components.values() if isinstance(c, torch.nn.Module))
    assert (said.out, said.err) == ("", "")
    tiny.draw(pipe)
    assert capfd.readouterr().err == ""  # no bar of steps either


def test_progress_bars_are_as_before(saved):
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    load(saved)
    assert logging.is_progress_bar_enabled()
    assert diffusers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("dtype", "autoencoder"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_the_autoencoder_is_never_in_float16(saved, dtype, autoencoder):
    pipe = load(saved, dtype)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (dtype, dtype, autoencoder)
    with torch.no_grad():  # as the pipeline does it, in its own precision
        pixels = pipe.vae.decode(torch.zeros(1, 4, 8, 8, dtype=dtype)).sample
        latents = pipe.vae.encode(torch.zeros(1, 3, 16, 16, dtype=dtype)).latent_dist.mode()
    assert (pixels.dtype, latents.dtype) == (autoencoder, autoencoder)


@pytest.mark.skipif(not embedded_pipeline().is_dir(), reason="the embedded pipeline is not in this checkout")
def test_the_embedded_pipeline():
    pipe = load("embedded")
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


# ------------------------------------------------------------------------------------- the hub's cache, single files


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache, empty, and the hub out of reach."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, name: str, folder: Path) -> None:
    """Put a folder into the cache as a model repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def test_a_hub_id_from_the_cache(cache, saved):
    put(cache, "somebody/tiny", saved)
    pipe = load("somebody/tiny")
    assert torch.equal(tiny.draw(pipe), tiny.draw(tiny.tiny_sd1()))
    assert pipe.safety_checker is None


def test_a_hub_id_that_is_out_of_reach(cache):
    with pytest.raises(LorakitError, match=r"no 'somebody/tiny' here.* HF_HUB_OFFLINE is set\n.*model_index\.json"):
        load("somebody/tiny")


def original(pipe) -> dict[str, torch.Tensor]:
    """The weights of a pipeline of SD1's shape as the original code names them."""
    import single_files

    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    flat = "text_encoder.embeddings."
    weights = single_files.weights_of(models).items()
    W = {name.replace(flat, "text_encoder.text_model.embeddings."): t for name, t in weights}
    file = {name: t.float().contiguous() for name, t in single_files.pack("sd1", W).items()}
    levels = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
        name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        is_matrix = "attn_1" in name and tensor.dim() == 2
        file[f"first_stage_model.{name}"] = tensor[..., None, None].contiguous() if is_matrix else tensor
    return file


def test_a_single_file_of_an_original_checkpoint(cache, tmp_path, monkeypatch):
    """Its weights, with the configuration and the tokenizer of the model that it is one of, from the hub's cache."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "checkpoint"))
    torch.manual_seed(7)
    pipe = tiny.tiny_sd1(seed=7)
    whole = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 12, 12),
        sample_size=8,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=tiny.WIDTH,
        in_channels=4,
        out_channels=4,
    )
    pipe.unet = whole.eval()
    pipe.save_pretrained(tmp_path / "folder")
    put(cache, "stable-diffusion-v1-5/stable-diffusion-v1-5", tmp_path / "folder")
    save_file(original(pipe), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    torch.testing.assert_close(tiny.draw(loaded), tiny.draw(pipe), atol=1e-5, rtol=1e-5)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.vae.decode(z).sample, pipe.vae.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert (loaded.safety_checker, loaded.vae.dtype) == (None, torch.float32)


def test_a_single_file_without_its_models_configuration(cache, tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "m.safetensors")
    with pytest.raises(LorakitError, match=r"stable-diffusion-v1-5.*\n.*the configuration of .* m\.safetensors needs"):
        load(tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------------- refused


def test_without_diffusers(monkeypatch, saved):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LorakitError, match=r"(?s)needs? diffusers.*not installed.*pip install 'lorakit\[image\]'"):
        load(saved)


def test_a_revision_of_what_is_on_this_disk(saved, tmp_path):
    (tmp_path / "x.safetensors").touch()
    for path in (saved, tmp_path / "x.safetensors"):
        with pytest.raises(LorakitError, match="only hub ids have revisions"):
            load_pipeline(str(path), torch.float32, CPU, revision="fp16")


def test_a_language_model():
    with pytest.raises(LorakitError, match=r"model_index\.json is missing\n.*LlamaForCausalLM of transformers"):
        load(embedded_folder())


def test_one_component_and_the_folder_above(saved):
    with pytest.raises(LorakitError, match=r"one component of a pipeline \(UNet2DConditionModel\)"):
        load(saved / "unet")
    with pytest.raises(LorakitError, match=rf"did you mean {saved}\?"):
        load(saved.parent)


def test_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LorakitError, match="it is an adapter"):
        load(tmp_path)


def test_a_name_that_is_nowhere(saved):
    with pytest.raises(LorakitError, match="did you mean 'tiny'"):
        load(saved.parent / "tinny")
    with pytest.raises(LorakitError, match=r"there is no pipeline 'x\.safetensors'"):
        load("x.safetensors")


def test_a_damaged_folder(saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(LorakitError, match=r"cannot load the pipeline .*: it lacks vae"):
        load(folder)
    shutil.copytree(saved / "vae", folder / "vae")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12345\n")
    with pytest.raises(LorakitError, match=r"git-lfs pointer.*12,345 bytes"):
        load(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(LorakitError, match="cannot load the pipeline"):
        load(folder)


def test_a_pipeline_that_takes_no_prompt(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(LorakitError, match="a DDPMPipeline, which makes no picture from a prompt"):
        load(tmp_path / "ddpm")
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"x")
    with pytest.raises(LorakitError, match=r"is a file, but no \.safetensors"):
        load(file)
