"""Combining adapters: the exact sum against float64 maths, the other methods against peft on ΔW."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_adapters import adapter, deltas, exact, factors, hadamard, kronecker, numbers, packed
from peft.utils import merge_utils
from torch import nn

import lorakit as lk
from lorakit.adapter.algebra.combine import combined
from lorakit.adapter.algebra.dare import dare_linear, dare_ties, drop
from lorakit.adapter.algebra.ties_merging import magnitude_prune, ties, trim
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.fingerprint import fingerprint
from lorakit.errors import AdapterError, ConfigError

# ---- the exact sum ----


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), min_size=4, max_size=4),
    others=st.booleans(),
)
def test_a_weighted_sum_of_any_ranks_kinds_and_scales_is_exact(ranks, weights, others):
    values = [adapter(seed, rank, others, rslora=seed % 2 == 0) for seed, rank in enumerate(ranks)]
    weights = weights[: len(values)]
    mixed = deltas(lk.combine(values, weights))
    for m in values[0].updates:
        expected = sum(w * exact(v.updates[m]) for w, v in zip(weights, values, strict=True))
        torch.testing.assert_close(mixed[m], expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()) + 1e-6)


def test_the_ranks_add_up_and_equal_strengths_stay_in_alpha():
    a, b = (
        lk.Adapter(lk.LoraConfig(rank=4, targets=["q"]), {"q": factors(seed=s, dtype=torch.bfloat16)}) for s in (0, 1)
    )
    f = (a + b).factors["q"]
    assert (f.rank, f.scale, f.A.dtype) == (8, 1.5, torch.bfloat16)
    assert torch.equal(f.A, torch.cat([a.factors["q"].A, b.factors["q"].A]))
    assert torch.equal(f.B, torch.cat([a.factors["q"].B, b.factors["q"].B], 1))
    mixed = (0.7 * a + 0.3 * b).factors["q"]
    assert (mixed.rank, mixed.alpha, mixed.B.dtype) == (8, 8.0, torch.float32)


def test_the_parts_of_a_packed_projection_stay_apart():
    a, b = (lk.Adapter(lk.LoraConfig(rank=2, targets=["qkv"]), {"qkv": packed(rank=r, seed=r)}) for r in (2, 3))
    both = 0.5 * a + b
    assert both.factors["qkv"].parts == (True, False, True)
    assert both.factors["qkv"].rank == 5
    assert both.config.packed == {"qkv": [True, False, True]}
    torch.testing.assert_close(exact(both.factors["qkv"]), 0.5 * exact(a.factors["qkv"]) + exact(b.factors["qkv"]))
    plain = lk.Adapter(lk.LoraConfig(rank=4, targets=["qkv"]), {"qkv": lk.Factors(numbers(4, 9), numbers(12, 4), 8.0)})
    mixed = a - plain
    assert mixed.factors["qkv"].parts is None
    torch.testing.assert_close(
        exact(mixed.factors["qkv"]), exact(a.factors["qkv"]) - exact(plain.factors["qkv"]), rtol=1e-5, atol=1e-5
    )


def test_modules_of_only_some_adapters_are_kept():
    a = lk.Adapter(lk.LoraConfig(rank=4, targets=["q"]), {"q": factors(), "v": factors(seed=1)})
    b = lk.Adapter(lk.LoraConfig(rank=2, targets=["k"]), {"v": factors(seed=2, rank=2), "k": factors(seed=3, rank=2)})
    both = lk.combine([a, b], [2, 3])
    assert list(both.factors) == ["q", "v", "k"]
    torch.testing.assert_close(exact(both.factors["k"]), 3 * exact(b.factors["k"]))
    assert {m: both.config.rank_of(m) for m in both.factors} == {"q": 4, "v": 6, "k": 2}
    assert both.config.targets == ["k", "q", "v"]


def test_an_update_alone_stays_of_its_kind():
    lora, other = (
        lk.Adapter(lk.LoraConfig(rank=4, targets=["q"]), {"q": factors(dtype=torch.bfloat16)}),
        adapter(others=True),
    )
    both = lk.combine([lora, other], [0.3, -2.0])
    assert {m: type(both.updates[m]) for m in other.updates} == {m: type(u) for m, u in other.updates.items()}
    assert both.factors["q"].A is lora.factors["q"].A
    for m, u in other.updates.items():
        torch.testing.assert_close(exact(both.updates[m]), -2 * exact(u), rtol=1e-6, atol=1e-6)


def test_loha_lokr_and_whole_updates_add_to_a_whole_update_or_to_the_rank_asked_for():
    lora = lk.Factors(numbers(3, 18), numbers(20, 3), 3.0)
    values = [
        lk.Adapter(lk.LoraConfig(rank=3, targets=["m"]), {"m": u})
        for u in (hadamard(), kronecker(), Dense(numbers(20, 18), numbers(20)))
    ]
    values.append(lk.Adapter(lk.LoraConfig(rank=3, targets=["m"]), {"m": lora}))
    weights = [1.0, -0.5, 2.0, 0.1]
    total = lk.combine(values, weights).updates["m"]
    expected = sum(
        w * exact(u) for w, u in zip(weights, (hadamard(), kronecker(), Dense(numbers(20, 18)), lora), strict=True)
    )
    torch.testing.assert_close(total.delta().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.bias, 2 * numbers(20))
    with pytest.raises(AdapterError, match="'m' changes its bias too"):
        lk.combine(values, weights, rank=4)
    values[2] = replace(values[2], updates={"m": Dense(numbers(20, 18))})
    cut = combined(values, weights, rank=4)
    best = torch.linalg.svdvals(expected)[4:].square().sum().sqrt() / expected.norm()
    assert cut.adapter.factors["m"].rank == 4
    assert cut.modules[0].error == pytest.approx(float(best), rel=1e-4)


def test_a_combined_adapter_survives_pefts_folder(tmp_path):
    a, b = (
        replace(v, updates={m: f for m, f in v.factors.items() if not f.transposed})
        for v in (adapter(0, rslora=True), adapter(9))
    )
    mixed = 0.3 * a - b
    back = lk.Adapter.load(mixed.save(tmp_path / "mixed"))
    for m, W in deltas(mixed).items():
        torch.testing.assert_close(exact(back.factors[m]), W)


def test_the_sum_computes_what_the_two_activated_together_do(tiny_llama):
    values = []
    for seed, rank in ((1, 3), (2, 5)):
        model = tiny.randomise_factors(
            lk.attach(tiny.llama(), lk.LoraConfig(rank=rank, targets=["q_proj", "down_proj"])), seed
        )
        values.append(lk.capture(model))
    both = lk.attach(tiny.llama(), values[0], "a")
    lk.attach(both, values[1], "b")
    lk.activate(both, {"a": 0.7, "b": 0.3})
    lk.attach(tiny_llama, 0.7 * values[0] + 0.3 * values[1])
    torch.testing.assert_close(tiny.logits(tiny_llama), tiny.logits(both), atol=1e-5, rtol=0)


# ---- against peft ----


class Kinds(nn.Module):
    """A module of each kind that peft can combine."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.conv = nn.Embedding(21, 16), nn.Linear(16, 24), nn.Conv2d(6, 8, 3)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two adapters of unlike ranks in a peft model, and the same two as values."""
    torch.manual_seed(0)
    model = None
    values = []
    for name, rank in (("a", 3), ("b", 5)):
        config = peft.LoraConfig(r=rank, lora_alpha=7, target_modules=["emb", "lin", "conv"], init_lora_weights=False)
        if model is None:
            model = peft.PeftModel(Kinds(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, selected_adapters=[name])
        values.append(lk.Adapter.load(folder / name))
    return model, values


def peft_delta(model, name, **options):
    """ΔW of each module, of peft's combination."""
    if name in model.peft_config:
        model.base_model.delete_adapter(name)
    model.base_model.add_weighted_adapter(["a", "b"], adapter_name=name, **options)
    modules = dict(model.base_model.model.named_modules())
    return {m: modules[m].get_delta_weight(name).detach().double() for m in ("emb", "lin", "conv")}


METHODS = [
    ("cat", "cat", {}),
    ("linear", "cat", {}),
    ("svd", "svd", {}),
    ("ties", "ties_svd", {"density": 0.4}),
    ("magnitude_prune", "magnitude_prune_svd", {"density": 0.4}),
    ("dare_linear", "dare_linear_svd", {"density": 1.0}),
    ("dare_ties", "dare_ties_svd", {"density": 1.0}),
]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 2.0]])
@pytest.mark.parametrize("ours, theirs, options", METHODS, ids=[f"{o} as {t}" for o, t, _ in METHODS])
def test_methods_on_delta_w_agree_with_pefts_of_that_definition(two, ours, theirs, options, weights):
    model, values = two
    expected = peft_delta(model, "mix", weights=weights, combination_type=theirs, **options)
    got = deltas(lk.combine(values, weights, ours, **options))
    for m, W in expected.items():
        torch.testing.assert_close(got[m], W, atol=1e-5 * float(W.abs().max()), rtol=1e-4)


def test_ties_by_the_frequency_of_signs_agrees_too(two):
    model, values = two
    expected = peft_delta(
        model, "mix", weights=[1.0, 1.0], combination_type="ties_svd", density=0.5, majority_sign_method="frequency"
    )
    got = deltas(lk.combine(values, method="ties", density=0.5, majority="frequency"))
    for m, W in expected.items():
        torch.testing.assert_close(got[m], W, atol=1e-5 * float(W.abs().max()), rtol=1e-4)


def test_pefts_linear_adds_a_and_b_apart_which_is_another_update(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lin"], init_lora_weights=False)
    model = peft.PeftModel(Kinds(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.save_pretrained(tmp_path, selected_adapters=["a", "b"])
    a, b = (lk.Adapter.load(tmp_path / name).factors["lin"] for name in "ab")
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="linear")
    theirs = model.base_model.model.lin.get_delta_weight("mix").detach()
    exact_sum = 0.7 * a.delta() + 0.3 * b.delta()
    crossed = 2.0 * 0.21**0.5 * (a.B @ b.A + b.B @ a.A)
    torch.testing.assert_close(theirs, exact_sum + crossed, rtol=1e-4, atol=1e-5)
    assert float(crossed.norm() / exact_sum.norm()) > 0.5


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_given_the_same_dropped_numbers(monkeypatch, method):
    dense = [numbers(9, 14, seed=s) for s in (0, 1, 2)]
    sparse = [drop(d, 0.4, 0, "m", i) for i, d in enumerate(dense)]
    masks = iter([(s != 0).float() for s in sparse])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    weights = [0.5, 1.0, 2.0]
    theirs = getattr(merge_utils, method)(dense, torch.tensor(weights), 0.4)
    ours = dare_linear(sparse, weights) if method == "dare_linear" else dare_ties(sparse, weights)
    torch.testing.assert_close(ours, theirs)


# ---- the methods' own definitions ----


def test_trim_leaves_exactly_the_largest_share():
    W = numbers(13, 17)
    kept = trim(W, 0.2)
    assert int((kept != 0).sum()) == int(0.2 * W.numel())
    assert kept[kept != 0].abs().min() >= W[kept == 0].abs().max()
    assert trim(W, 1.0) is W
    assert not trim(W, 0.001).any()


def test_ties_is_the_papers_by_hand():
    a, b, c = (
        torch.tensor([4.0, 3.0, 0.1, -2.0]),
        torch.tensor([-5.0, 1.0, 0.2, -0.5]),
        torch.tensor([2.0, -0.1, 3.0, 0.1]),
    )
    # trimmed to half: [4 3 0 0], [-5 1 0 0], [2 0 3 0]; sums 1, 4, 3, 0; means of those that agree: (4+2)/2, (3+1)/2,
    # 3/1, 0
    torch.testing.assert_close(ties([a, b, c], [1, 1, 1], 0.5), torch.tensor([3.0, 2.0, 3.0, 0.0]))


def test_a_negative_weight_elects_signs_as_they_are_added():
    a, b = numbers(6, 5), numbers(6, 5, seed=1)
    torch.testing.assert_close(ties([a, b], [1.0, -1.0], 0.5), ties([a, -b], [1.0, 1.0], 0.5))
    torch.testing.assert_close(magnitude_prune([a, b], [1.0, -1.0], 1.0), a - b)


def test_dare_keeps_the_expected_update_and_depends_on_the_seed_alone():
    W = numbers(200, 300)
    kept = drop(W, 0.3, 0, "q", 0)
    share = float((kept != 0).float().mean())
    assert abs(share - 0.3) < 0.01
    torch.testing.assert_close(kept[kept != 0], (W / 0.3)[kept != 0])
    assert torch.equal(kept, drop(W, 0.3, 0, "q", 0))
    assert not any(torch.equal(kept, drop(W, 0.3, *other)) for other in ((1, "q", 0), (0, "k", 0), (0, "q", 1)))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_the_methods_take_every_kind_and_report_what_the_cut_cost(method):
    values = [adapter(s, 4, others=True) for s in (0, 5)]
    done = combined(values, [1.0, 0.5], method, density=0.5, seed=3)
    assert {u.variant for u in done.adapter.updates.values()} == {"lora"}
    assert done.adapter.factors["layers.0.qkv"].parts == (True, False, True)
    assert done.adapter.factors["layers.0.conv"].kind == "conv"
    assert done.adapter.factors["embed"].kind == "embedding"
    assert {m.module for m in done.modules} == set(values[0].updates)
    assert 0.1 < done.error < 1
    full = combined(values, [1.0, 0.5], method, density=0.5, seed=3, keep=1.0)
    assert full.error < 1e-5
    small, whole = deltas(done.adapter), deltas(full.adapter)
    for report in done.modules:
        true = float((small[report.module] - whole[report.module]).norm() / whole[report.module].norm())
        assert report.error == pytest.approx(true, rel=1e-3, abs=1e-5)
    again = combined(values, [1.0, 0.5], method, density=0.5, seed=3).adapter
    assert all(torch.equal(f.B, again.factors[m].B) for m, f in done.adapter.factors.items())


def test_changes_of_vectors_are_combined_by_the_same_method():
    values = [
        lk.Adapter(lk.LoraConfig(targets=["q"]), {"q": factors(seed=s), "norm": Dense(numbers(40, seed=s))})
        for s in (0, 1)
    ]
    got = lk.combine(values, method="ties", density=0.5).updates["norm"].weight
    torch.testing.assert_close(got, ties([numbers(40), numbers(40, seed=1)], [1, 1], 0.5))
    torch.testing.assert_close((values[0] + values[1]).updates["norm"].weight, numbers(40) + numbers(40, seed=1))


# ---- what must agree ----


def with_saved(value: float, **metadata) -> lk.Adapter:
    saved = {"head.weight": torch.full((2, 3), value)}
    return lk.Adapter(lk.LoraConfig(rank=4, targets=["q"], save_modules=["head"]), {"q": factors()}, saved, metadata)


def test_weights_saved_whole_are_kept_where_equal_and_refused_by_name_where_not():
    assert torch.equal((with_saved(1.0) + with_saved(1.0)).saved["head.weight"], torch.ones(2, 3))
    with pytest.raises(AdapterError, match=r"different values of 1 saved weights: head\.weight"):
        lk.combine([with_saved(1.0), with_saved(2.0)])
    mean = lk.combine([with_saved(1.0), with_saved(2.0)], [1, 3], saved="mean")
    torch.testing.assert_close(mean.saved["head.weight"], torch.full((2, 3), 1.75))
    assert mean.config.save_modules == ["head"]
    with pytest.raises(AdapterError, match="add up to 0"):
        lk.combine([with_saved(1.0), with_saved(2.0)], [1, -1], saved="mean")


def test_embeddings_are_taken_over():
    a, b = (
        lk.Adapter(lk.LoraConfig(targets=["q"]), {"q": factors()}, embeddings={name: numbers(2, 8)})
        for name in ("<cat>", "<dog>")
    )
    assert set((a + b).embeddings) == {"<cat>", "<dog>"}
    with pytest.raises(AdapterError, match="different values of 1 embeddings: <cat>"):
        lk.combine([a, replace(a, embeddings={"<cat>": numbers(2, 8) + 1})])


def test_adapters_of_different_bases_are_refused():
    def trained(seed, dtype=torch.float32):
        torch.manual_seed(seed)
        return with_saved(1.0, fingerprint=fingerprint({"w": torch.randn(30, 40).to(dtype)}, "Net"))

    mixed = trained(0) + trained(0, torch.bfloat16)
    assert mixed.metadata["fingerprint"]["architecture"] == "Net"
    assert mixed.metadata["combined"] == {"method": "linear", "weights": [1.0, 1.0]}
    with pytest.raises(AdapterError, match=r"adapters 1 and 2 were trained on different bases:\n  weights: w"):
        trained(0) + trained(1)
    assert lk.combine([trained(0), trained(1)], force=True)
    assert with_saved(1.0) + trained(0)


def of_modules(*names):
    return lk.Adapter(lk.LoraConfig(targets=["q"]), {name: factors() for name in names})


def test_adapters_without_fingerprints_and_of_unlike_modules_are_refused():
    llama, unet = of_modules("model.layers.0.self_attn.q_proj"), of_modules("unet.down_blocks.0.attentions.0.proj_in")
    with pytest.raises(
        AdapterError, match=r"(?s)different bases:.*first changes model\.layers.*second changes unet\..*--force-base"
    ):
        llama + unet
    marked = replace(unet, metadata={"fingerprint": fingerprint({"w": torch.randn(3, 4)}, "UNet")})
    with pytest.raises(AdapterError, match="no module and no stack of layers in common"):
        llama + marked
    assert len(lk.combine([llama, unet], force=True).factors) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
        ("unet.down_blocks.0.q", "text_encoder_2.text_model.encoder.layers.0.q"),
        ("transformer.transformer_blocks.0.q", "text_encoder.text_model.encoder.layers.0.q"),
        ("lm_head", "model.layers.0.q"),
    ],
)
def test_other_modules_of_one_model_or_pipeline_are_combined(one, other):
    assert set((of_modules(one) + of_modules(other)).factors) == {one, other}


def test_a_unet_and_a_transformer_are_of_different_pipelines():
    with pytest.raises(AdapterError, match="different bases"):
        of_modules("unet.down_blocks.0.q") + of_modules("transformer.single_transformer_blocks.0.q")
    with pytest.raises(AdapterError, match="different bases"):
        of_modules("transformer.h.0.q") + of_modules("transformer.single_transformer_blocks.0.q")  # GPT-2, Flux


def test_modules_of_other_shapes_are_refused_by_name():
    a = lk.Adapter(lk.LoraConfig(targets=["q"]), {"q": factors()})
    for other in (lk.Factors(numbers(4, 14), numbers(12, 4), 1.0), factors("conv"), factors("embedding")):
        with pytest.raises(AdapterError, match="'q' has different shapes"):
            a + lk.Adapter(lk.LoraConfig(targets=["q"]), {"q": other})
    with pytest.raises(AdapterError, match="'q' is a DoRA"):
        a + lk.Adapter(lk.LoraConfig(targets=["q"]), {"q": Dora(factors(), torch.ones(12, 1))})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [0, 0]}, "not all of them 0"),
        ({"method": "ties"}, "needs a density"),
        ({"density": 0.5}, "has no density"),
        ({"method": "ties", "density": 0}, "needs a density"),
        ({"weights": [1, float("nan")]}, "finite"),
        ({"rank": 0}, "at least 1"),
        ({"keep": 2}, "at most 1"),
    ],
)
def test_what_makes_no_sense_is_said(options, said):
    with pytest.raises(ConfigError, match=said):
        lk.combine([adapter(0), adapter(1)], **options)
