"""What an image adapter's file says of its training: trigger words, tags, settings, from kohya's and Stability's header fields.

    ss_tag_frequency      {"10_sks dog": {"a dog": 12, ...}}: image folder -> how often each tag of its captions occurs
    ss_*, modelspec.*     settings, as text (kohya's sd-scripts; the modelspec of Stability AI)

A folder is called `<repeats>_<trigger words>`, by kohya's convention. Fields that are not what they should be are passed over: they are
somebody's notes, and nothing depends on them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

# The fields that a reader wants to see, and how they are called here.
_NOTES = {
    "modelspec.title": "title", "ss_output_name": "name", "modelspec.author": "author", "modelspec.description": "description",
    "modelspec.architecture": "architecture", "ss_sd_model_name": "trained on", "ss_base_model_version": "model version",
    "ss_network_module": "network", "ss_network_args": "network arguments", "ss_resolution": "resolution", "modelspec.resolution": "resolution",
    "ss_num_train_images": "images", "ss_num_epochs": "epochs", "ss_steps": "steps", "ss_max_train_steps": "most steps",
    "ss_learning_rate": "learning rate", "ss_unet_lr": "unet learning rate", "ss_text_encoder_lr": "text encoder learning rate",
    "ss_optimizer": "optimizer", "ss_lr_scheduler": "schedule", "ss_clip_skip": "clip skip", "ss_seed": "seed",
    "ss_training_comment": "comment", "modelspec.usage_hint": "usage hint", "modelspec.license": "license",
}  # fmt: skip
MOST_TAGS = 12


def training(header: Any) -> dict[str, Any]:
    """Trigger words, the commonest tags and the settings of the training, from a kohya or modelspec header; empty without one.

    kohya's image folders are called `<repeats>_<trigger words>`; its `ss_tag_frequency` counts the captions' tags in each.
    """
    if not isinstance(header, Mapping):
        return {}
    told: dict[str, Any] = {}
    folders, tags = _tags(header.get("ss_tag_frequency"))
    folders += [f for f in _object(header.get("ss_dataset_dirs")) if f not in folders]
    phrase = header.get("modelspec.trigger_phrase")
    triggers = [phrase] if isinstance(phrase, str) and phrase else []
    for folder in folders:
        repeats, _, name = folder.partition("_")
        if repeats.isdigit() and name and name not in triggers:
            triggers.append(name)
    if triggers:
        told["trigger words"] = triggers
    if tags:
        told["commonest tags"] = dict(tags.most_common(MOST_TAGS))
    for key, name in _NOTES.items():
        value = header.get(key)
        if isinstance(value, str | int | float) and str(value) not in ("", "None", "null", "{}"):
            told.setdefault(name, str(value)[:500])
    return told


def _tags(text: Any) -> tuple[list[str], Counter[str]]:
    tags: Counter[str] = Counter()
    folders = []
    for folder, counts in _object(text).items():
        folders.append(folder)
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            if isinstance(count, int) and tag.strip():
                tags[tag.strip()] += count
    return folders, tags


def _object(text: Any) -> dict[str, Any]:
    """A JSON object inside a header; empty if it is none."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return {}
    return dict(value) if isinstance(value, Mapping) else {}
