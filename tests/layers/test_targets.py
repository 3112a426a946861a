"""From names to modules: what is chosen, and what is said where a name fits nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import TargetError
from lorakit.layers.targets import find_targets, module_names, shortest_endings


def chosen(model: nn.Module, **config) -> list[str]:
    return list(find_targets(model, lk.LoraConfig(**config)).modules)


def test_all_linear_is_every_linear_but_the_head(tiny_llama):
    names = chosen(tiny_llama)
    linears = [n for n, m in tiny_llama.named_modules() if isinstance(m, nn.Linear)]
    assert names == [n for n in linears if n != "lm_head"]
    assert len(names) == 14


def test_all_linear_counts_transformers_conv1d(tiny_gpt2):
    assert {n.rsplit(".", 1)[-1] for n in chosen(tiny_gpt2)} == {"c_attn", "c_proj", "c_fc"}


def test_a_list_matches_by_ending_at_a_dot_and_a_string_the_whole_name(tiny_llama):
    assert chosen(tiny_llama, targets=["0.self_attn.q_proj"]) == ["model.layers.0.self_attn.q_proj"]
    assert chosen(tiny_llama, targets=r".*layers\.1\..*[kv]_proj") == [
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(TargetError, match="no module matches target 'proj'"):
        chosen(tiny_llama, targets=["proj"])


def test_layers_and_exclude_narrow_the_choice(tiny_llama, tiny_t5):
    assert chosen(tiny_llama, targets=["q_proj", "k_proj"], layers=[1], exclude=["k_proj"]) == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert chosen(tiny_llama, targets=["q_proj"], exclude=r".*layers\.0.*") == ["model.layers.1.self_attn.q_proj"]
    assert all(".block.0." in n for n in chosen(tiny_t5, targets=["q"], layers=[0]))


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"targets": ["q_pro", "v_proj"]},
            r"target 'q_pro' \(LoraConfig.targets\)\n"
            r"  did you mean 'q_proj'\? 2 modules have this ending, for example model.layers.0.self",
        ),
        ({"targets": ["q_proj", "zzz"]}, r"target 'zzz'.*\n  names in this model end in: .*q_proj"),
        ({"targets": ["attn.q_proj"]}, "did you mean 'self_attn.q_proj'"),
        (
            {"targets": "q_proj"},
            r"pattern 'q_proj'.*\n"
            r"  a string is a regular expression.*\['q_proj'\] or '\.\*q_proj' for the 2 modules with this ending",
        ),
        ({"targets": "all-linaer"}, r"did you mean 'all-linear'\?"),
        ({"targets": r".*\.w_q"}, "a string is a regular expression for full names"),
        (
            {"targets": ["q_proj"], "exclude": ["k_porj"]},
            r"matches exclude 'k_porj' \(LoraConfig.exclude\)\n  did you mean 'k_proj'",
        ),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "nothing is left to adapt"),
        (
            {"targets": ["q_proj"], "layers": [0, 5]},
            r"no target is in layer 5 .*\n  the targets are in layers \[0, 1\]",
        ),
        ({"targets": ["embed_tokens"], "layers": [0]}, "without numbers"),
        (
            {"targets": ["q_proj"], "rank_pattern": {"q_porj": 4}},
            r"matches 'q_porj' \(LoraConfig.rank_pattern\)\n  did you mean 'q_proj'",
        ),
        ({"targets": ["q_proj"], "alpha_pattern": {"k_proj": 4}}, r"matches 'k_proj' \(LoraConfig.alpha_pattern\)"),
        (
            {"targets": ["q_proj", "input_layernorm"]},
            r"is a LlamaRMSNorm, which has no low-rank update\n  expected a Linear",
        ),
        (
            {"targets": ["self_attn"]},
            r"'model.layers.0.self_attn' is a LlamaAttention.*\n.*\n  it contains model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_a_name_that_fits_nothing_is_named_with_the_nearest(config, said, tiny_llama):
    with pytest.raises(TargetError, match=said):
        chosen(tiny_llama, **config)


def test_every_misspelt_target_is_listed(tiny_llama):
    with pytest.raises(TargetError) as caught:
        chosen(tiny_llama, targets=["q_porj", "k_porj", "v_proj"])
    assert "q_porj" in str(caught.value)
    assert "k_porj" in str(caught.value)
    assert "'v_proj' (" not in str(caught.value)


@pytest.mark.parametrize(
    "targets, kind", [("0", "LayerNorm"), ("1", "ConvTranspose2d"), ("2", "EmbeddingBag"), ("3", "Bilinear")]
)
def test_modules_without_a_low_rank_update_are_refused(targets, kind):
    model = nn.Sequential(nn.LayerNorm(4), nn.ConvTranspose2d(2, 2, 2), nn.EmbeddingBag(4, 4), nn.Bilinear(2, 2, 2))
    with pytest.raises(TargetError, match=f"is a {kind}, which has no low-rank update"):
        chosen(model, targets=[targets])


def test_an_adapter_for_a_module_without_an_update_is_refused():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(TargetError, match="LayerNorm, which has no low-rank update"):
        lk.attach(
            model,
            lk.Adapter(
                lk.LoraConfig(rank=2, targets=["0"]), {"0": lk.Factors(torch.randn(2, 4), torch.randn(4, 2), 4.0)}
            ),
        )


def test_a_model_without_linears_says_so():
    with pytest.raises(TargetError, match="has no linear layer to adapt"):
        chosen(nn.Sequential(nn.Conv2d(2, 2, 1)))


class Twice(nn.Module):
    """One linear under two names, as weight-sharing transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("targets", ["all-linear", ["first"], ["second"], ["first", "second"]], ids=str)
def test_a_module_under_two_names_is_adapted_once_and_both_see_it(targets):
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 6)
    base = tiny.bits(model)
    tiny.randomise_factors(lk.attach(model, lk.LoraConfig(rank=2, targets=targets)))
    value = lk.capture(model)
    assert len(value.factors) == 1
    (f,) = value.factors.values()
    weight = base["first.weight"] + f.delta()
    expected = torch.nn.functional.linear(
        torch.tanh(torch.nn.functional.linear(x, weight, base["first.bias"])), weight, base["first.bias"]
    )
    torch.testing.assert_close(model(x), expected)
    lk.merge(model)
    torch.testing.assert_close(model(x), expected)
    lk.unmerge(model)
    lk.detach(model)
    assert tiny.same_bits(tiny.bits(model), base)
    assert type(model.first) is nn.Linear


def test_factors_under_both_names_of_one_module_are_refused():
    f = lk.Factors(torch.randn(2, 6), torch.randn(6, 2), 4.0)
    with pytest.raises(TargetError, match="'first' and 'second', which are the same module"):
        lk.attach(Twice(), lk.Adapter(lk.LoraConfig(rank=2), {"first": f, "second": f}))


def test_an_adapter_for_another_model_names_what_is_lost(tiny_llama, tiny_mlp):
    value = lk.capture(lk.attach(tiny_mlp, lk.LoraConfig(rank=2)))
    with pytest.raises(
        TargetError, match="3 of the adapter's 3 modules are not in this LlamaForCausalLM: lin0, lin1, head"
    ):
        lk.attach(tiny_llama, value, force=True)
    with pytest.raises(TargetError):
        lk.attach(tiny_llama, value, force=True, strict=False)


def test_an_adapter_that_fits_in_part_is_refused_unless_told_and_then_listed(tiny_mlp):
    value = lk.capture(lk.attach(tiny.mlp(), lk.LoraConfig(rank=2, targets=["lin0", "lin1"])))
    renamed = lk.Adapter(value.config, {"lin0": value.factors["lin0"], "linn1": value.factors["lin1"]})
    with pytest.raises(
        TargetError, match=r"1 of the adapter's 2 modules are not in this Mlp: linn1; did you mean 'lin1'\?"
    ):
        lk.attach(tiny_mlp, renamed)
    lk.attach(tiny_mlp, renamed, strict=False)
    assert lk.summary(tiny_mlp).skipped == {"linn1": "no such module in this model"}
    assert list(lk.capture(tiny_mlp).factors) == ["lin0"]


def test_the_recorded_targets_are_the_shortest_that_mean_the_same(tiny_llama):
    every = list(module_names(tiny_llama))
    queries = [n for n in every if n.endswith("q_proj")]
    assert shortest_endings(queries, every) == ["q_proj"]
    assert shortest_endings(queries[:1], every) == queries[:1]


def test_lorakits_own_children_are_no_targets(tiny_bert):
    lk.attach(tiny_bert, lk.LoraConfig(rank=2, save_modules=["classifier"]))
    assert not any("lora_" in n for n in module_names(tiny_bert))
    assert "lora_" not in "".join(chosen(tiny_bert))
