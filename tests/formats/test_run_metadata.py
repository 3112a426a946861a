"""What an adapter's file says of the run that trained it, read by the rules of the programs that show it."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from safetensors import safe_open

import lorakit as lk
from lorakit.analysis.inspect import describe_adapter
from lorakit.formats.run_metadata import run_metadata

SD1 = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SDXL = "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
SD3, FLUX = "transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q"
WAN = "transformer.blocks.0.attn1.to_q"
WIDTHS = {SD1: 1280, SDXL: (1280, 2048), SD3: 1536, FLUX: 3072, WAN: 5120}
RECORD = {
    "recipe": {
        "task": "text_to_image",
        "model": "/home/someone/models/sd-v1-5",
        "data": "/home/someone/pictures/dog",
        "steps": 400,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "text_encoder_learning_rate": 5e-5,
        "resolution": 512,
        "min_snr": 5.0,
        "noise_offset": 0.05,
        "seed": 7,
    },
    "data": {
        "name": "dog",
        "hash": "0" * 64,
        "pictures": 6,
        "items": 60,
        "prior": 16,
        "trigger": "sks dog",
        "tags": {"sks dog": 6, "on grass": 2, "in a é bowl": 1},
        "buckets": {"512x512": 40, "448x576": 20},
    },
    "metrics": {"step": 300, "loss": 0.1, "steps": 300},
}


def adapter(module: str = SD1, **metadata) -> lk.Adapter:
    out, inner = WIDTHS[module] if isinstance(WIDTHS[module], tuple) else (WIDTHS[module],) * 2
    update = lk.Factors(torch.ones(2, inner), torch.ones(out, 2), 2.0)
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=2, targets=["to_q"]), {module: update}, metadata=RECORD | metadata)


def header_of(value: lk.Adapter, path, format: str = "kohya") -> dict[str, str]:
    value.save(path, format)
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def a1111(header: dict[str, str]) -> dict[str, object]:
    """What A1111's card of a LoRA shows, by the rules of its network.py and ui_edit_user_metadata.py."""
    parsed = {k: json.loads(v) if v.startswith("{") else v for k, v in header.items()}
    if str(parsed.get("ss_base_model_version", "")).startswith("sdxl_"):
        version = "SDXL"
    else:
        version = "SD2" if str(parsed.get("ss_v2", "")) == "True" else "SD1" if parsed else "Unknown"
    tags: Counter[str] = Counter()
    for counts in parsed.get("ss_tag_frequency", {}).values():
        tags.update({tag.strip(): int(n) for tag, n in counts.items()})
    buckets: Counter[str] = Counter()
    for bucket in parsed.get("ss_bucket_info", {}).get("buckets", {}).values():
        buckets[f"{bucket['resolution'][1]}x{bucket['resolution'][0]}"] += int(bucket["count"])
    pictures = sum(int(params.get("img_count", 0)) for params in parsed.get("ss_dataset_dirs", {}).values())
    named = {name: parsed.get(f"ss_{name}") for name in ("output_name", "sd_model_name", "network_module")}
    return {"version": version, "tags": dict(tags), "buckets": dict(buckets), "pictures": pictures, **named}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfyui"])
def test_a1111_shows_what_the_run_knows(format, tmp_path):
    header = header_of(adapter(), tmp_path / "dog_v1.safetensors", format)
    assert a1111(header) == {
        "version": "SD1",
        "tags": RECORD["data"]["tags"],
        "buckets": {"512x512": 40, "576x448": 20},
        "pictures": 6,
        "output_name": "dog_v1",
        "sd_model_name": "sd-v1-5",
        "network_module": "networks.lora",
    }
    expected = {
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "5e-05",
        "ss_steps": "300",
        "ss_max_train_steps": "400",
        "ss_total_batch_size": "4",
        "ss_num_train_images": "60",
        "ss_num_reg_images": "16",
        "ss_resolution": "(512, 512)",
        "ss_seed": "7",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "0.05",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.resolution": "512x512",
        "modelspec.title": "dog_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    assert {key: header.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "module, version, architecture, shown",
    [
        (SD1, "sd_v1", "stable-diffusion-v1/lora", "SD1"),
        (SDXL, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "SDXL"),
        (SD3, "sd3", "stable-diffusion-3-m/lora", "SD1"),  # A1111 knows of no other than SD2 and SDXL
        (FLUX, "flux1", "flux-1-dev/lora", "SD1"),
        (WAN, "wan", "wan/lora", "SD1"),
    ],
)
def test_the_base_is_named_in_each_family(module, version, architecture, shown, tmp_path):
    header = header_of(adapter(module), tmp_path / "x.safetensors")
    assert (header["ss_base_model_version"], header["modelspec.architecture"]) == (version, architecture)
    assert a1111(header)["version"] == shown


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfyui"])
def test_no_path_and_no_home_folder_is_in_the_file(format, tmp_path):
    recipe = RECORD["recipe"] | {"prior_data": "~/class", "mask": ["C:\\Users\\me\\masks", "../masks/one"]}
    value = adapter(recipe=recipe, started_from={"adapter": "/home/someone/older/adapter"})
    header = header_of(value, tmp_path / "x.safetensors", format)
    whole = " ".join(header.values())
    assert not re.search(r"home|someone|Users|~|\.\./", whole)
    assert {"class", "masks", "adapter"} <= set(re.findall(r"\w+", whole))


def test_equal_runs_make_equal_files_and_inspect_reads_the_notes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        adapter().save(tmp_path / name / "x.safetensors", "kohya")
    assert (tmp_path / "a/x.safetensors").read_bytes() == (tmp_path / "b/x.safetensors").read_bytes()
    again = lk.Adapter.load(tmp_path / "a/x.safetensors")
    notes = str(describe_adapter(again, tmp_path / "a/x.safetensors").training)
    assert "sks dog" in notes
    assert "on grass" in notes
    # What a converted file says of its training stays.
    header = header_of(again, tmp_path / "c.safetensors", "diffusers")
    assert json.loads(header["ss_tag_frequency"]) == {"dog": RECORD["data"]["tags"]}


def test_an_interrupted_run_says_as_much(tmp_path):
    header = header_of(adapter(metrics={"step": 20, "loss": None, "steps": 20}), tmp_path / "x.safetensors")
    assert (header["ss_steps"], header["ss_max_train_steps"]) == ("20", "400")
    assert json.loads(header["ss_tag_frequency"]) == {"dog": RECORD["data"]["tags"]}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"recipe": None, "data": [], "metrics": "x"},
        {"recipe": {"model": 3, "seed": [1], "crop": {}}, "data": {"pictures": "six", "tags": ["a"]}},
        {"data": {"pictures": 2, "tags": {"a": "b"}, "buckets": {"wide": 1, "8x8": "many"}, "trigger": 5}},
    ],
)
def test_a_damaged_record_tells_nothing_and_breaks_nothing(record):
    found = run_metadata(record)
    assert all(isinstance(value, str) for value in found.values())
    assert not {"ss_tag_frequency", "ss_bucket_info", "modelspec.trigger_phrase", "ss_seed"} & found.keys()


def test_a_run_on_text_has_no_pictures_in_its_metadata():
    found = run_metadata({"recipe": {"learning_rate": 2e-4}, "data": {"name": "rows.jsonl", "rows": 10}})
    assert found == {"ss_learning_rate": "0.0002", "ss_unet_lr": "0.0002"}
