"""Merging several adapters at once: what the live model computes with all of them active, at their weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import logits, randomise_factors

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.lora import Factors
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, LorakitError


@pytest.fixture
def base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(seed: int, **config) -> lk.Adapter:
    model = tiny.llama()
    lk.attach(model, lk.LoraConfig(**{"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"], **config}))
    return lk.capture(randomise_factors(model, seed))


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_merged_model_is_the_live_one_with_both_active(base, tmp_path):
    a, b = adapter(1), adapter(2, rank=3, targets=["q_proj", "o_proj"], rslora=True)
    model = tiny.llama()
    lk.attach(model, a, name="a")
    lk.attach(model, b, name="b")
    lk.activate(model, {"a": 0.7, "b": -0.4})
    expected = logits(model)
    report = merge_checkpoint(base, [a, b], tmp_path / "out", weights=[0.7, -0.4])
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    ranks = {r.module.rsplit(".", 1)[-1]: r.rank for r in report.targets}
    assert ranks == {"q_proj": 5, "down_proj": 2, "o_proj": 3}
    assert "0.7 x" in report.adapter


def test_adapters_on_disk_in_several_formats_are_one_call(base, tmp_path):
    a, b = adapter(1), adapter(2)
    a.save(tmp_path / "a")
    b.save(tmp_path / "b", format="mlx")
    merge_checkpoint(base, [tmp_path / "a", str(tmp_path / "b")], tmp_path / "out")
    merge_checkpoint(base, lk.combine([a, b]), tmp_path / "sum")
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "sum")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_a_whole_weight_that_two_adapters_hold_alike_is_taken_once(base, tmp_path):
    norm = {"model.norm.weight": torch.full((16,), 1.5)}
    a, b = replace(adapter(1), saved=norm), replace(adapter(2), saved=norm)
    report = merge_checkpoint(base, [a, b], tmp_path / "out")
    assert report.replaced == ("model.norm.weight",)
    assert tensors(tmp_path / "out")["model.norm.weight"].equal(norm["model.norm.weight"])


def refused(base, tmp_path, adapters, **options) -> str:
    with pytest.raises(LorakitError) as caught:
        merge_checkpoint(base, adapters, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    return str(caught.value)


def test_two_values_of_one_whole_weight_are_refused(base, tmp_path):
    values = [{"model.norm.weight": torch.full((16,), v)} for v in (1.5, 2.0)]
    message = refused(base, tmp_path, [replace(adapter(n), saved=v) for n, v in enumerate(values)])
    assert "different values of the saved weight 'model.norm.weight'" in message
    assert "--saved mean" in message


@pytest.mark.parametrize("weight", [0.0, 0.5, -1.0])
def test_a_whole_weight_has_no_other_weight_than_one(weight, base, tmp_path):
    whole = replace(adapter(1), saved={"model.norm.weight": torch.full((16,), 1.5)})
    message = refused(base, tmp_path, [adapter(2), whole], weights=[1.0, weight])
    assert "adapter 2 has saved weights (model.norm.weight), which cannot be scaled" in message


def test_adapters_that_cancel_each_other_are_no_merge(base, tmp_path):
    assert "cancel each other" in refused(base, tmp_path, [adapter(1), adapter(1)], weights=[1.0, -1.0])


def test_a_weight_that_one_replaces_and_one_changes_is_refused(base, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = replace(adapter(1, targets=["down_proj"]), saved={name: torch.ones(16, 16)})
    assert f"'{name}' twice" in refused(base, tmp_path, [whole, adapter(2)])


def test_doras_are_scaled_and_added_as_a_live_model_does(base, tmp_path):
    plain = adapter(1)
    first, second = (
        replace(plain, updates={m: Dora(f, size * torch.ones(f.B.shape[0], 1)) for m, f in plain.factors.items()})
        for size in (1.0, 0.3)
    )
    several, weights = [first, plain, second], [0.5, 2.0, -0.7]
    merge_checkpoint(base, several, tmp_path / "out", weights=weights)
    model = tiny.llama()
    for name, each in zip("abc", several, strict=True):
        lk.attach(model, each, name=name)
    lk.activate(model, dict(zip("abc", weights, strict=True)))
    lk.merge(model)
    expected = lk.detach(model, merged="keep").state_dict()
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "weights,said",
    [([1.0], "1 weights for 2"), ([1.0, float("nan")], "finite"), ([1.0, 0.0], "its weight is 0")],
    ids=str,
)
def test_weights_are_one_finite_number_for_each_adapter(weights, said, base, tmp_path):
    assert said in refused(base, tmp_path, [adapter(1), adapter(2)], weights=weights)


def test_an_empty_list_is_refused(base, tmp_path):
    assert "no adapter" in refused(base, tmp_path, [])


def test_learned_tokens_alone_are_nothing_to_merge_and_beside_factors_a_warning(base, tmp_path):
    tokens = {"<s1>": torch.ones(16)}
    message = refused(base, tmp_path, replace(adapter(1), updates={}, embeddings=tokens))
    assert "<s1>" in message
    report = merge_checkpoint(base, replace(adapter(1), embeddings=tokens), tmp_path / "out")
    assert any("<s1>" in w for w in report.warnings)


def test_an_adapter_for_another_base_is_refused_among_several(base, tmp_path):
    other = tiny.llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    lk.attach(other, lk.LoraConfig(rank=2, alpha=4, targets=["q_proj"]))
    strange = lk.capture(randomise_factors(other))
    assert "another base" in refused(base, tmp_path, [adapter(1), strange])
    merge_checkpoint(base, [adapter(1), strange], tmp_path / "out", force_base=True)


def test_updates_of_all_kinds_add_up(base, tmp_path):
    made = torch.Generator().manual_seed(0)
    module = "model.layers.1.mlp.up_proj"
    low = Factors(torch.randn(3, 16, generator=made), torch.randn(24, 3, generator=made), 6)
    whole = Dense(torch.randn(24, 16, generator=made))
    config = lk.LoraConfig(rank=3, alpha=6, targets=["up_proj"])
    merge_checkpoint(
        base, [lk.Adapter(config, {module: low}), lk.Adapter(config, {module: whole})], tmp_path / "out", weights=[2, 3]
    )
    before, after = tensors(base), tensors(tmp_path / "out")
    expected = before[f"{module}.weight"].double() + 2 * 2 * low.B.double() @ low.A.double() + 3 * whole.weight.double()
    torch.testing.assert_close(after[f"{module}.weight"].double(), expected, atol=1e-5, rtol=0)
    assert all(after[n].equal(before[n]) for n in before if n != f"{module}.weight")


def test_a_zero_adapter_among_several_is_named(base, tmp_path):
    zero = replace(adapter(1), updates={m: replace(f, B=f.B * 0) for m, f in adapter(1).factors.items()})
    with pytest.raises(AdapterError, match="zero everywhere"):
        merge_checkpoint(base, [adapter(2), zero], tmp_path / "out")
