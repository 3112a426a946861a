"""`layers` and `layers_pattern` choose what PEFT chooses; `strict_targets=False` takes what there is."""

from __future__ import annotations

import peft
import pytest
import tiny
from architectures import causal_lm
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, TargetError
from lorakit.formats.peft_config import from_peft


class Nested(nn.Module):
    """Numbers in several places: a stage, blocks in it, experts in those."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "blocks": nn.ModuleList(
                        nn.ModuleDict(
                            {"experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3))}
                        )
                        for _ in range(4)
                    )
                }
            )
            for _ in range(2)
        )


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def sequential():
    return nn.Sequential(
        nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3))})
    )


MODELS = {
    "llama": (tiny.llama, "q_proj"),
    "gpt2": (tiny.gpt2, "c_attn"),
    "t5": (tiny.t5, "q"),
    "bert": (tiny.bert, "query"),
    "mixtral": (lambda: causal_lm("mixtral"), "q_proj"),
    "nested": (lambda: Wrapped(Nested()), "w1"),
    "nested, stages in front": (Nested, "w1"),
    "a number in front": (sequential, "q"),
}


def peft_picks(make, target, layers, pattern) -> set[str] | None:
    config = peft.LoraConfig(r=2, target_modules=[target], layers_to_transform=layers, layers_pattern=pattern)
    try:
        model = peft.get_peft_model(make(), config)
    except ValueError:
        return None
    return {
        n.removeprefix("base_model.model.").rsplit(".lora_A", 1)[0] for n, _ in model.named_modules() if "lora_A.d" in n
    }


@pytest.mark.parametrize("pattern", [None, "layers", ["blocks"], ["h", "layer", "block"], "experts", "stages"], ids=str)
@pytest.mark.parametrize("layers", [[0], [1], [0, 1], [2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_those_that_peft_picks(name, layers, pattern):
    make, target = MODELS[name]
    expected = peft_picks(make, target, layers, pattern)
    patterns = [pattern] if isinstance(pattern, str) else pattern or []
    config = lk.LoraConfig(rank=2, targets=[target], layers=layers, layers_pattern=patterns)
    if expected is None:
        with pytest.raises(TargetError, match=r"no target is in layer"):
            lk.attach(make(), config)
        return
    found = set(lk.capture(lk.attach(make(), config)).updates)
    assert found == expected


def test_a_stack_without_two_names_in_front_has_its_first_number():
    trunk = tiny.llama().model
    found = lk.capture(lk.attach(trunk, lk.LoraConfig(rank=2, targets=["q_proj"], layers=[1]))).updates
    assert list(found) == ["layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("pattern", ["h", ["h"], ["blocks", "h"], None, [], ""], ids=str)
def test_layers_pattern_is_read_from_pefts_config(pattern):
    values = {"peft_type": "LORA", "target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": pattern}
    config, _ = from_peft(values, "adapter_config.json")
    assert config.layers_pattern == ([pattern] if isinstance(pattern, str) and pattern else pattern or [])
    assert list(lk.capture(lk.attach(tiny.gpt2(), config)).updates) == ["transformer.h.1.attn.c_attn"]


def test_layers_pattern_needs_layers():
    with pytest.raises(ConfigError, match="give layers too"):
        lk.LoraConfig(layers_pattern=["h"])


ONE_FOR_ALL = ["q_proj", "c_attn", "query", "SelfAttention.q"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("way", ["the config's", "attach's"])
def test_one_list_of_targets_for_many_models(name, way):
    make, target = MODELS[name]
    config = lk.LoraConfig(rank=2, targets=ONE_FOR_ALL, strict_targets=way != "the config's")
    model = lk.attach(make(), config, strict=way != "attach's")
    assert {m.rsplit(".", 1)[-1] for m in lk.capture(model).updates} == {target}
    missed = {t for t, why in lk.summary(model).skipped.items() if why == "no module matches this target"}
    assert missed == {t for t in ONE_FOR_ALL if not t.endswith(target)}
    assert "skipped" in str(lk.summary(model))


def test_targets_that_all_miss_are_an_error_all_the_same(tiny_llama):
    with pytest.raises(TargetError, match=r"no module matches target 'c_attn'(.|\n)*'query'"):
        lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=["c_attn", "query"], strict_targets=False))
    with pytest.raises(TargetError, match="no module matches target 'c_attn'"):
        lk.attach(tiny_llama, lk.LoraConfig(rank=2, targets=ONE_FOR_ALL))
