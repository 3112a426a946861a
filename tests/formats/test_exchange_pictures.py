"""Whole pictures: adapters from files, stacked, merged and put into a pipeline's folder, beside real diffusers.

A picture is the decoded one, 8 bits a channel; two are the same if no element differs by more than 1 of 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import draw, tiny_sd1, tiny_sdxl
from torch import Tensor

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint

MAKE = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}
COMPONENTS = {"sd1": ["unet", "text_encoder"], "sdxl": ["unet", "text_encoder", "text_encoder_2"]}
WEIGHTS = [(0.7, 0.7), (1.0, 0.7)]


def picture(pipe: Any) -> np.ndarray:
    """[height, width, 3] of 0 to 255, as signed numbers."""
    return np.asarray(draw(pipe, output_type="pil")[0]).astype(int)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    assert abs(one - other).max() <= 1


def assert_differs(one: np.ndarray, other: np.ndarray) -> None:
    assert abs(one - other).max() >= 8


def trained(pipe: Any, seed: int, **config: Any) -> lk.Adapter:
    """An adapter with random factors, as a run on this pipeline would leave it."""
    config = {"rank": 2, "alpha": 4, "targets": "kohya", "components": config.pop("parts")} | config
    lk.attach(pipe, lk.LoraConfig(**config))
    adapter = randomised(lk.capture(pipe), seed)
    lk.detach(pipe)
    return adapter


def randomised(adapter: lk.Adapter, seed: int) -> lk.Adapter:
    made = torch.Generator().manual_seed(seed)

    def random(_: str, t: Tensor) -> Tensor:
        return 0.15 * torch.randn(t.shape, generator=made)

    updates = {module: update.map(random) for module, update in adapter.updates.items()}
    return lk.Adapter(adapter.config, updates, metadata=adapter.metadata)


@pytest.fixture(params=MAKE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The pipeline of `tiny_sd1` as a folder."""
    path = tmp_path_factory.mktemp("base") / "pipeline"
    tiny_sd1().save_pretrained(path)
    return path


def opened(folder: Path) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_rank_4_alpha_8_and_8_in_the_middle_draw_the_same_picture_in_diffusers(family, format, tmp_path):
    pipe = MAKE[family]()
    blocks = {"rank": 4, "alpha": 8, "rank_pattern": {r".*mid_block.*": 8}, "alpha_pattern": {r".*mid_block.*": 4}}
    adapter = trained(pipe, 1, parts=COMPONENTS[family], **blocks)
    assert len({f.scale for f in adapter.factors.values()}) == 2
    lk.attach(pipe, adapter)
    adapter.save(tmp_path / "x.safetensors", format)
    theirs = MAKE[family]()
    theirs.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    torch.testing.assert_close(draw(theirs), draw(pipe), atol=1e-5, rtol=0)
    assert_same(picture(theirs), picture(pipe))
    assert_differs(picture(pipe), picture(MAKE[family]()))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_without_the_unets_part_the_text_encoders_part_still_changes_the_picture(family, format, tmp_path):
    adapter = trained(MAKE[family](), 1, parts=COMPONENTS[family])
    still = {m: u.map(lambda _, t: 0 * t) if m.startswith("unet.") else u for m, u in adapter.updates.items()}
    adapter = lk.Adapter(adapter.config, still)
    adapter.save(tmp_path / "x.safetensors", format)
    ours, theirs = MAKE[family](), MAKE[family]()
    lk.attach(ours, lk.Adapter.load(tmp_path / "x.safetensors"))
    theirs.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    base = draw(MAKE[family]())
    assert (draw(ours) - base).abs().max() > 1e-3
    torch.testing.assert_close(draw(theirs), draw(ours), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_two_stacked_adapters_are_one_picture_here_in_diffusers_and_merged(weights, folder, tmp_path):
    pipe = opened(folder)
    adapters = [trained(pipe, seed, parts=COMPONENTS["sd1"], rank=seed) for seed in (2, 3)]
    for name, adapter in zip("ab", adapters):
        adapter.save(tmp_path / f"{name}.safetensors", "kohya")
        lk.attach(pipe, lk.Adapter.load(tmp_path / f"{name}.safetensors"), name=name)
    lk.activate(pipe, dict(zip("ab", weights)))
    ours = picture(pipe)
    assert_differs(ours, picture(opened(folder)))
    lk.activate(pipe, {"a": weights[0]})
    assert_differs(ours, picture(pipe))

    theirs = opened(folder)
    for name in "ab":
        theirs.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(["a", "b"], list(weights))
    assert_same(picture(theirs), ours)

    one = opened(folder)
    lk.attach(one, weights[0] * adapters[0] + weights[1] * adapters[1])
    assert_same(picture(one), ours)
    lk.merge(one)
    assert_same(picture(one), ours)
    lk.unmerge(one)

    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    merge_checkpoint(folder, files, tmp_path / "merged", weights=list(weights))
    assert_same(picture(opened(tmp_path / "merged")), ours)


def test_a_merged_pipeline_folder_is_the_live_merge(folder, tmp_path):
    pipe = opened(folder)
    adapter = trained(pipe, 4, parts=COMPONENTS["sd1"])
    adapter.save(tmp_path / "x.safetensors", "diffusers")
    merge_checkpoint(folder, [tmp_path / "x.safetensors"], tmp_path / "merged")
    lk.attach(pipe, adapter)
    live = draw(pipe)
    lk.merge(pipe)
    again = opened(tmp_path / "merged")
    torch.testing.assert_close(draw(again), live, atol=1e-5, rtol=0)
    for component in COMPONENTS["sd1"]:
        weights = dict(getattr(pipe, component).state_dict())
        for name, tensor in getattr(again, component).state_dict().items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-6)


def test_a_loha_of_a_unet_goes_out_in_lycoris_form_and_comes_back(tmp_path):
    from safetensors.torch import load_file

    pipe = tiny_sd1()
    adapter = trained(pipe, 5, parts=["unet"], variant="loha", targets="locon")
    path = adapter.save(tmp_path / "x.safetensors", "kohya")
    lk.attach(pipe, adapter)
    ours = draw(pipe)
    again = tiny_sd1()
    lk.attach(again, lk.Adapter.load(path))
    torch.testing.assert_close(draw(again), ours, atol=1e-5, rtol=0)

    # LyCORIS' own arithmetic on the file: (w1_a w1_b) ∘ (w2_a w2_b) · alpha / rank, added to the weights
    plain, tensors = tiny_sd1(), load_file(path)
    names = {f"lora_unet_{n.replace('.', '_')}": m for n, m in plain.unet.named_modules() if hasattr(m, "weight")}
    keys = {key.partition(".")[0] for key in tensors}
    assert keys <= names.keys()
    assert len(keys) == len(adapter.updates)
    for key in keys:
        w1a, w1b, w2a, w2b = (tensors[f"{key}.hada_{w}"].double() for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
        delta = (w1a @ w1b) * (w2a @ w2b) * (tensors[f"{key}.alpha"].double() / w1b.shape[0])
        weight = names[key].weight.data
        weight += delta.reshape(weight.shape).float()
    torch.testing.assert_close(draw(plain), ours, atol=1e-5, rtol=0)
