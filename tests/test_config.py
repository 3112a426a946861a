"""LoraConfig: what it accepts, what it says otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorakit as lk
from lorakit.config import scale_of
from lorakit.errors import ConfigError


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no setting 'rnak'; did you mean 'rank'\?"):
        lk.LoraConfig(rnak=8)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rank": 0}, "LoraConfig.rank"),
        ({"rank": 10**6}, "LoraConfig.rank"),
        ({"rank": "many"}, "LoraConfig.rank"),
        ({"alpha": 0}, "LoraConfig.alpha"),
        ({"alpha": -4}, "LoraConfig.alpha"),
        ({"alpha": float("inf")}, "LoraConfig.alpha"),
        ({"alpha": float("nan")}, "LoraConfig.alpha"),
        ({"dropout": 1.0}, "LoraConfig.dropout"),
        ({"dropout": -0.1}, "LoraConfig.dropout"),
        ({"bias": "some"}, "LoraConfig.bias"),
        ({"targets": []}, "at least one name ending"),
        ({"targets": ["q_proj", ""]}, "at least one name ending"),
        ({"targets": "*_proj"}, "not a regular expression"),
        ({"exclude": "("}, "not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank for 'q_proj' must be at least 1"),
        ({"rank_pattern": {"q_proj": 10**6}}, "rank"),
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha for 'q_proj' must be a positive number"),
        ({"packed": {"c_attn": [False, False]}}, "no part of 'c_attn' is adapted"),
        ({"init": "pizza"}, "LoraConfig.init"),
        ({"lora_plus": 8.0, "freeze_a": True}, "lora_plus has no effect with freeze_a=True: it is B's learning rate"),
        ({"variant": "lora_plus", "freeze_a": True}, "lora_plus has no effect with freeze_a=True"),
        ({"variant": "lora_fa", "lora_plus": 8.0}, "A is not trained; remove one of them"),
        ({"lokr_factor": 4}, "lokr_factor has an effect with variant='lokr' only"),
        ({"lora_plus": 0}, "LoraConfig.lora_plus"),
    ],
)
def test_a_wrong_value_is_refused_and_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        lk.LoraConfig(**settings)


def test_alpha_is_32_whatever_the_rank_unless_given():
    assert lk.LoraConfig(rank=4).alpha == 32
    assert lk.LoraConfig(rank=4, alpha=8).alpha == 8


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert scale_of(32, 16, False) == 2
    assert scale_of(32, 16, True) == 8


def test_patterns_give_the_first_match_by_name_ending_or_expression():
    config = lk.LoraConfig(
        rank=8, alpha=16, rank_pattern={"q_proj": 4, r".*\.1\..*": 2}, alpha_pattern={"layers.0.q_proj": 5}
    )
    assert config.rank_of("model.layers.1.q_proj") == 4
    assert config.rank_of("model.layers.1.k_proj") == 2
    assert config.rank_of("model.layers.0.my_q_proj") == 8
    assert config.alpha_of("model.layers.0.q_proj") == 5
    assert config.alpha_of("model.layers.10.q_proj") == 16


def test_a_config_cannot_be_changed_but_replaced():
    config = lk.LoraConfig(rank=8)
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 9
    assert config.replace(rank=9).rank == 9
    assert config.rank == 8
    with pytest.raises(ConfigError, match="rank"):
        config.replace(rank=-1)


def test_targets_do_not_depend_on_their_order():
    assert lk.LoraConfig(targets=["b", "a", "b"]) == lk.LoraConfig(targets=["a", "b"])


def test_importing_lorakit_does_not_import_torch():
    code = "import sys, lorakit; lorakit.LoraConfig(rank=4); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_of_lorakit_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = lk.atach
    assert "attach" in dir(lk)


def test_a_setting_under_pefts_name_is_told_ours():
    with pytest.raises(ConfigError, match=r"'target_modules'; PEFT's 'target_modules' is 'targets' here"):
        lk.LoraConfig(target_modules=["q_proj"])


@pytest.mark.parametrize(
    "name, settings", [("pissa", {"init": "pissa"}), ("rslora", {"rslora": True}), ("lora_plus", {"lora_plus": 16.0})]
)
def test_a_descendant_that_is_lora_with_another_setting_can_be_named_as_a_variant(name, settings):
    config = lk.LoraConfig(variant=name)
    assert config == lk.LoraConfig(**settings)
    assert config.replace(rank=4) == lk.LoraConfig(rank=4, **settings)


def test_a_short_name_beside_another_value_of_its_setting_is_refused():
    with pytest.raises(ConfigError, match="variant 'pissa' stands for init: pissa, but init is olora"):
        lk.LoraConfig(variant="pissa", init="olora")
    with pytest.raises(ConfigError, match="there is no 'pisa'; did you mean 'pissa'"):
        lk.LoraConfig(variant="pisa")
