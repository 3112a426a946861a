"""What a kohya file's metadata says of a training run, from lorakit's own record of it (`Adapter.metadata`).

    recipe    the run's settings that are not defaults     -> ss_learning_rate, ss_seed, ss_noise_offset, ...
    data      pictures, tags of captions, trigger, buckets -> ss_tag_frequency, ss_bucket_info, modelspec.trigger_phrase
    metrics   step, steps                                  -> ss_steps, ss_max_train_steps

Programs show these (A1111's card of a LoRA, CivitAI, Lora Manager) and look for trigger words in them. No path goes
into a file that is given away: of a base or data on disk only its last part, and no time, so that equal runs make equal
files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name; not ./folder, ~/folder, C:\folder
_PATH = re.compile(r"(file:)?(/[^/\s]+/|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|\.{1,2}[\\/])\S*")
# lorakit's setting -> the field. Only what a run was given: defaults of ours are no news to other programs.
_SETTINGS = {
    "learning_rate": ("ss_learning_rate", "ss_unet_lr"),
    "text_encoder_learning_rate": ("ss_text_encoder_lr",),
    "schedule": ("ss_lr_scheduler",),
    "batch_size": ("ss_total_batch_size",),
    "epochs": ("ss_num_epochs",),
    "seed": ("ss_seed",),
    "noise_offset": ("ss_noise_offset",),
    "min_snr": ("ss_min_snr_gamma",),
    "caption_dropout": ("ss_caption_dropout_rate",),
    "shuffle_tags": ("ss_shuffle_caption",),
    "keep_tags": ("ss_keep_tokens",),
    "flip": ("ss_flip_aug",),
    "crop": ("ss_random_crop",),
    "dropout": ("ss_network_dropout",),
    "prior_weight": ("ss_prior_loss_weight",),
    "gradient_checkpointing": ("ss_gradient_checkpointing",),
    "precision": ("ss_mixed_precision",),
}
_MOST_TAGS = 1000


def run_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """The fields that `facts` (`Adapter.metadata`) tell. A value of another kind than expected is left out."""
    recipe, data, metrics = (_mapping(facts.get(name)) for name in ("recipe", "data", "metrics"))
    found: dict[str, str] = {}
    for name, keys in _SETTINGS.items():
        value = recipe.get(name)
        if name == "crop":
            value = None if value is None else value == "random"
        if isinstance(value, bool | int | float | str):
            found |= dict.fromkeys(keys, _text(value))
    base = recipe.get("model") or recipe.get("base")
    if isinstance(base, str) and base:
        found["ss_sd_model_name"] = without_path(base)
    found |= _steps(recipe, metrics)
    return found | _pictures(recipe, data)


def _steps(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    done, planned = metrics.get("step"), recipe.get("steps", metrics.get("steps"))
    named = {"ss_steps": done, "ss_max_train_steps": planned}
    return {key: str(value) for key, value in named.items() if isinstance(value, int)}


def _pictures(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    """Those of a run on pictures, whose data has their number."""
    count = data.get("pictures")
    if not isinstance(count, int):
        return {}
    folder = without_path(str(data.get("name") or "pictures"))
    repeated = data.get("items") if isinstance(data.get("items"), int) else count
    found = {
        "ss_num_train_images": str(repeated),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": count}}),
    }
    if isinstance(data.get("prior"), int):
        found["ss_num_reg_images"] = str(data["prior"])
    tags = {str(t): n for t, n in _mapping(data.get("tags")).items() if isinstance(n, int)}
    if tags:
        found["ss_tag_frequency"] = json.dumps({folder: dict(list(tags.items())[:_MOST_TAGS])}, ensure_ascii=False)
    trigger = data.get("trigger") or recipe.get("trigger")
    if isinstance(trigger, str) and trigger:
        found["modelspec.trigger_phrase"] = trigger
    counted = {_size(name): n for name, n in _mapping(data.get("buckets")).items() if isinstance(n, int)}
    buckets = {size: n for size, n in counted.items() if size}
    if buckets:
        numbered = {str(i): {"resolution": list(s), "count": n} for i, (s, n) in enumerate(sorted(buckets.items()))}
        found["ss_bucket_info"] = json.dumps({"buckets": numbered})
        found["ss_enable_bucket"] = str(len(buckets) > 1)
    resolution = recipe.get("resolution")
    most_used = max(buckets, key=lambda size: buckets[size], default=())
    size = (resolution, resolution) if isinstance(resolution, int) else most_used
    if size:
        found["ss_resolution"] = f"({size[0]}, {size[1]})"
        found["modelspec.resolution"] = f"{size[0]}x{size[1]}"
    return found


def without_path(name: str) -> str:
    """A hub id as it is; of a path its last part."""
    return name if _HUB_ID.fullmatch(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def own_entry(facts: Mapping[str, Any], *left_out: str) -> dict[str, str]:
    """{"lorakit": the record as JSON}, its paths cut to their last part; nothing if the record is empty."""
    ours = {key: _without_paths(value) for key, value in facts.items() if key not in left_out}
    return {"lorakit": json.dumps(ours, sort_keys=True)} if ours else {}


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    return without_path(value) if isinstance(value, str) and _PATH.match(value) else value


def _size(bucket: Any) -> tuple[int, ...]:
    return tuple(map(int, str(bucket).split("x"))) if re.fullmatch(r"\d{1,5}x\d{1,5}", str(bucket)) else ()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: bool | float | str) -> str:
    return without_path(value) if isinstance(value, str) else str(value)
