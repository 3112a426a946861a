"""Read an image adapter's training notes (trigger words, tags, settings) from kohya's and Stability AI's header fields.

    ss_tag_frequency      {"10_sks dog": {"a dog": 12, ...}}: image folder -> count of each caption tag
    ss_*, modelspec.*     settings, as text (kohya's sd-scripts; the modelspec of Stability AI)

By kohya's convention a folder is named `<repeats>_<trigger words>`. Malformed fields are ignored: they are only notes,
and nothing depends on them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Header fields that are shown, and their names here.
_NOTES = {
    "modelspec.title": "title",
    "ss_output_name": "name",
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.architecture": "architecture",
    "ss_sd_model_name": "trained on",
    "ss_base_model_version": "model version",
    "ss_network_module": "network",
    "ss_network_args": "network arguments",
    "ss_resolution": "resolution",
    "modelspec.resolution": "resolution",
    "ss_num_train_images": "images",
    "ss_num_epochs": "epochs",
    "ss_steps": "steps",
    "ss_max_train_steps": "most steps",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "unet learning rate",
    "ss_text_encoder_lr": "text encoder learning rate",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_clip_skip": "clip skip",
    "ss_seed": "seed",
    "ss_training_comment": "comment",
    "modelspec.usage_hint": "usage hint",
    "modelspec.license": "license",
}
MOST_TAGS = 12


def training(header: Any) -> dict[str, Any]:
    """Trigger words, the most common tags and training settings of a kohya or modelspec header; may be empty."""
    if not isinstance(header, Mapping):
        return {}
    notes: dict[str, Any] = {}
    folders, tags = _tags(header.get("ss_tag_frequency"))
    folders += [f for f in _object(header.get("ss_dataset_dirs")) if f not in folders]
    phrase = header.get("modelspec.trigger_phrase")
    triggers = [phrase] if isinstance(phrase, str) and phrase else []
    for folder in folders:
        repeats, _, name = folder.partition("_")
        if repeats.isdigit() and name and name not in triggers:
            triggers.append(name)
    if triggers:
        notes["trigger words"] = triggers
    if tags:
        notes["commonest tags"] = dict(tags.most_common(MOST_TAGS))
    for key, name in _NOTES.items():
        value = header.get(key)
        if isinstance(value, str | int | float) and str(value) not in ("", "None", "null", "{}"):
            notes.setdefault(name, str(value)[:500])
    return notes


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
    """Parse a JSON object from a header field; empty if it is not one."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return {}
    return dict(value) if isinstance(value, Mapping) else {}
