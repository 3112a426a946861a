"""Merging finds a target by its whole path, or behind a prefix that models are known to be wrapped in."""

from __future__ import annotations

import pytest

from lorakit.checkpoint.renaming import Renaming, find_renaming
from lorakit.errors import TargetError

TARGET = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "prefix", ["", "model.", "transformer.", "language_model.model.", "model.language_model.", "bert."]
)
def test_the_whole_path_and_known_prefixes(prefix):
    rename = find_renaming([TARGET], [prefix + TARGET, "lm_head.weight"], "base")
    assert rename(TARGET) == prefix + TARGET
    back = find_renaming([prefix + TARGET], [TARGET, "lm_head.weight"], "base")
    assert back(prefix + TARGET) == TARGET


@pytest.mark.parametrize("prefix", ["vision.", "model.vision_tower.", "draft.model.", "encoder.x.", "text_encoder."])
def test_any_other_prefix_is_another_module_and_named(prefix):
    with pytest.raises(TargetError, match=rf"(?s)'{prefix}layers.0.self_attn.q_proj' is, .*lorakit edit .*--rename"):
        find_renaming([TARGET], [prefix + TARGET, "lm_head.weight"], "base")


def test_a_known_prefix_is_taken_where_another_precedes_the_same_name():
    tensors = [f"model.{TARGET}", f"vision_tower.{TARGET}"]
    assert find_renaming([TARGET], tensors, "base") == Renaming("", "model.")


def test_the_rename_that_is_suggested_finds_the_module():
    import torch

    from lorakit.adapter.adapter import Adapter
    from lorakit.adapter.algebra.edit import rename
    from lorakit.adapter.lora import Factors
    from lorakit.config import LoraConfig

    with pytest.raises(TargetError) as caught:
        find_renaming([TARGET], [f"vision.{TARGET}"], "base")
    old, new = str(caught.value).split("--rename '")[1].split("'")[0].split("=")
    module = TARGET.removesuffix(".weight")
    adapter = Adapter(LoraConfig(targets=["q_proj"]), {module: Factors(torch.ones(2, 4), torch.ones(4, 2), 2.0)})
    assert list(rename(adapter, {old: new}).updates) == [f"vision.{module}"]
