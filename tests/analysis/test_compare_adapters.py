"""Comparing adapters: on constructed cases with known answers, and against matrices in float64."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import tiny_lm
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.adapter.algebra.spectrum import spectrum
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lora import Factors
from lorakit.analysis.amplification import amplification, relative_norms
from lorakit.analysis.compare import compare, interference, principal_angles, similarity
from lorakit.checkpoint.weights import open_weights
from lorakit.errors import AdapterError, TargetError

OUT, IN = 24, 30


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def basis(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(rows, rows, seed=seed))[0]


U, V = basis(OUT), basis(IN, 1)


def update(outputs: slice, inputs: slice, *strengths: float) -> Factors:
    """A ΔW made of the given orthonormal directions."""
    S = torch.tensor(strengths, dtype=torch.float64)
    return Factors(V[:, inputs].T.contiguous(), U[:, outputs] * S, alpha=float(S.numel()))


def adapter(**updates) -> lk.Adapter:
    return lk.Adapter(lk.LoraConfig(rank=2, alpha=2), updates)


def pair(a, b):
    return compare(adapter(m=a), adapter(m=b)).pairs[0]


A = update(slice(0, 2), slice(0, 2), 3.0, 1.0)

# ------------------------------------------------------------------------------------ what is known beforehand


def test_an_adapter_equals_itself():
    found = compare(adapter(m=A), adapter(m=A))
    p = found.pairs[0]
    assert p.cosine == pytest.approx(1)
    assert p.angles_in + p.angles_out == pytest.approx([0] * 4, abs=1e-4)
    assert (p.phi_in, p.phi_out) == pytest.approx((1, 1))
    for side in (p.a_by_b, p.b_by_a):
        assert (side.change, side.gain, side.on_inputs, side.on_outputs) == pytest.approx((1, 1, 1, 1))
    assert (found.cosine, *found.changes) == pytest.approx((1, 1, 1))


def test_adapters_with_orthogonal_inputs_do_not_interfere():
    other = update(slice(0, 2), slice(2, 4), 5.0, 1.0)  # same outputs
    p = pair(A, other)
    assert (p.cosine, p.phi_in, p.a_by_b.change, p.a_by_b.gain, p.a_by_b.on_inputs, p.b_by_a.change) == pytest.approx(
        (0,) * 6, abs=1e-12
    )
    assert (p.phi_out, p.a_by_b.on_outputs) == pytest.approx((1, 1))
    assert p.angles_in == pytest.approx([90, 90])


def test_other_outputs_on_the_same_inputs_give_change_without_gain():
    p = pair(A, update(slice(2, 4), slice(0, 2), 3.0, 1.0))
    assert p.a_by_b.change == pytest.approx(1)
    assert (p.a_by_b.gain, p.cosine, p.a_by_b.on_outputs) == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("weight", [-1.0, 0.5, 3.0])
def test_a_multiple_of_an_adapter_changes_it_by_that_factor(weight):
    other = Factors(A.A, A.B * weight, A.alpha)
    p = pair(A, other)
    assert (p.a_by_b.change, p.a_by_b.gain) == pytest.approx((abs(weight), weight))
    assert (p.b_by_a.change, p.b_by_a.gain) == pytest.approx((abs(1 / weight), 1 / weight))
    assert p.cosine == pytest.approx(math.copysign(1, weight))


def test_sharing_half_of_the_energy_is_a_share_of_root_half():
    p = pair(A, update(slice(5, 7), slice(1, 3), 2.0, 2.0))  # reads A's second direction and one of its own
    assert p.a_by_b.on_inputs == pytest.approx(math.sqrt(0.5))
    assert p.phi_in == pytest.approx(0.5)
    assert p.angles_in == pytest.approx([0, 90], abs=1e-4)
    # On V_A S_A: A gives (9, 1), B gives 2 · 1 along the second.
    assert p.a_by_b.change == pytest.approx(2 / math.sqrt(81 + 1))


def test_a_known_principal_angle():
    turned = V[:, :1] * math.cos(math.radians(30)) + V[:, 5:6] * math.sin(math.radians(30))
    assert principal_angles(V[:, :1], turned) == pytest.approx([30])
    assert principal_angles(V[:, :0], turned) == []


# ------------------------------------------------------------------------------------ against matrices


def test_all_figures_agree_with_dense_matrices():
    a, b = (Factors(random(r, IN, seed=r), random(OUT, r, seed=r + 9), alpha=3.0) for r in (3, 5))
    M, N = (f.scale * f.B @ f.A for f in (a, b))
    p = pair(a, b)
    assert p.cosine == pytest.approx(float((M * N).sum() / M.norm() / N.norm()))
    i = p.a_by_b
    assert i.change == pytest.approx(float((N @ M.T).norm() / (M @ M.T).norm()))
    assert i.gain == pytest.approx(float(((N @ M.T) * (M @ M.T)).sum() / (M @ M.T).square().sum()))
    reads = torch.linalg.svd(M).Vh[:3].T
    writes = torch.linalg.svd(M).U[:, :3]
    assert i.on_inputs == pytest.approx(float((N @ reads).norm() / N.norm()))
    assert i.on_outputs == pytest.approx(float((writes.T @ N).norm() / N.norm()))


def test_phi_follows_the_papers_definition_for_all_i_and_j():
    P, Q = basis(12, 3)[:, :4], basis(12, 4)[:, :5]
    found = similarity(P, Q)
    for i in range(1, 5):
        for j in range(1, 6):
            assert float(found[i - 1, j - 1]) == pytest.approx(float((P[:, :i].T @ Q[:, :j]).norm() ** 2 / min(i, j)))


def test_phi_uses_the_requested_directions():
    a, b = (Factors(random(r, IN, seed=r), random(OUT, r, seed=r + 9), alpha=3.0) for r in (3, 5))
    matrices = {
        "A": [torch.linalg.svd(f.A, full_matrices=False).Vh.T for f in (a, b)],
        "B": [torch.linalg.svd(f.B, full_matrices=False).U for f in (a, b)],
        "right": [torch.linalg.svd(f.B @ f.A).Vh[: f.rank].T for f in (a, b)],
        "left": [torch.linalg.svd(f.B @ f.A).U[:, : f.rank] for f in (a, b)],
    }
    for of, (x, y) in matrices.items():
        (one,) = compare(adapter(m=a), adapter(m=b), of=of).similarities
        torch.testing.assert_close(torch.tensor(one.grid, dtype=torch.float64), similarity(x, y))
        assert one.chance == pytest.approx(5 / x.shape[0])


def test_random_subspaces_give_the_chance_value():
    P, Q = basis(600, 5)[:, :20], basis(600, 6)[:, :10]
    assert float(similarity(P, Q)[-1, -1]) == pytest.approx(20 / 600, rel=0.3)


def test_interference_agrees_with_sampled_inputs():
    """Sampled inputs along A's directions: `change` is the RMS of |ΔW_B x| over that of |ΔW_A x|."""
    a, b = (Factors(random(3, IN, seed=s), random(OUT, 3, seed=s), alpha=3.0) for s in (1, 2))
    M, N = (f.scale * f.B @ f.A for f in (a, b))
    x = M.T @ random(OUT, 20000)  # V S Uᵀ z
    expected = float((N @ x).norm() / (M @ x).norm())
    assert interference(spectrum(a), spectrum(b)).change == pytest.approx(expected, rel=0.02)


def test_overall_figures_include_modules_of_one_adapter_alone():
    B = update(slice(0, 2), slice(0, 2), 3.0, 1.0)
    lone = update(slice(0, 1), slice(0, 1), 2.0)
    found = compare(adapter(m=A, n=lone), adapter(m=B, o=lone))
    assert found.only == (["n"], ["o"])
    assert found.cosine == pytest.approx(10 / 14)  # 9 + 1 shared of 9 + 1 + 4
    assert found.changes[0] == pytest.approx(math.sqrt(82 / (82 + 16)))


def test_adapters_of_unrelated_bases_cannot_be_compared():
    llama, unet = adapter(**{"model.layers.0.q": A}), adapter(**{"unet.down_blocks.0.q": A})
    with pytest.raises(
        AdapterError, match=r"(?s)no module in common.*mine changes model\.layers\.0\.q\n  theirs changes unet\.down"
    ):
        compare(llama, unet, ("mine", "theirs"))


def test_adapters_of_different_modules_do_not_interfere():
    found = compare(adapter(q=A), adapter(v=A))
    assert (found.pairs, found.cosine, found.changes) == ([], 0, (0, 0))


def test_adapters_of_different_kinds_can_be_compared():
    loha = Loha(random(OUT, 2), random(2, IN), random(OUT, 2, seed=3), random(2, IN, seed=3), alpha=2.0)
    whole = Dense(loha.delta())
    found = compare(adapter(m=loha, n=A), adapter(m=whole, n=Dense(A.scale * A.B @ A.A)))
    assert [p.cosine for p in found.pairs] == pytest.approx([1, 1])
    assert {one.of for one in found.similarities} == {"right"}
    dora = Dora(A, torch.ones(OUT, 1))
    assert pair(A, dora).note == "B: DoRA, its low-rank part"


def test_a_zero_update_has_no_cosine_and_no_interference():
    zero = Factors(A.A, torch.zeros_like(A.B), 2.0)
    p = pair(A, zero)
    assert (p.cosine, p.phi_in, p.angles_in, p.b_by_a) == (None, None, [], None)
    assert p.a_by_b.change == 0
    json.dumps(compare(adapter(m=A), adapter(m=zero)).to_dict(), allow_nan=False)


def test_different_shapes_are_refused_by_module_name():
    with pytest.raises(AdapterError, match="'m' is 24 x 30 in mine and 24 x 29 in yours"):
        compare(adapter(m=A), adapter(m=Factors(random(2, 29), random(24, 2), 1.0)), ("mine", "yours"))


def test_modules_are_chosen_by_ending():
    one = adapter(**{"layers.0.q_proj": A, "layers.1.q_proj": A, "layers.0.v_proj": A})
    assert [s.module for s in compare(one, one, modules=["q_proj"]).similarities] == [
        "layers.0.q_proj",
        "layers.1.q_proj",
    ]
    with pytest.raises(TargetError, match="'q_pro'; did you mean 'q_proj'"):
        compare(one, one, modules=["q_pro"])


# ------------------------------------------------------------------------------------ ΔW against W


def test_the_amplification_factor_follows_table_7():
    W = random(OUT, IN, seed=7)
    f = Factors(random(3, IN), random(OUT, 3), alpha=3.0)
    M = f.B @ f.A
    left, _, right = torch.linalg.svd(M)
    found = amplification("m", f, W)
    assert found.in_delta == pytest.approx(float((left[:, :3].T @ W @ right[:3].T).norm()))
    assert found.in_w == pytest.approx(float(torch.linalg.svdvals(W)[:3].norm()), rel=1e-3)
    assert found.factor == pytest.approx(float(M.norm()) / found.in_delta)
    assert (found.norm_w, found.norm_delta, found.rank) == pytest.approx((float(W.norm()), float(M.norm()), 3))
    assert 0 < found.in_random < found.in_w


def test_an_update_along_the_weights_own_directions_amplifies_little():
    W = random(OUT, IN, seed=7)
    left, S, right = torch.linalg.svd(W)
    same = Factors(right[:2].contiguous(), left[:, :2] * S[:2], alpha=2.0)
    weak = Factors(right[-2:].contiguous(), left[:, -2:], alpha=2.0)  # where W does nothing at all
    assert amplification("m", same, W).factor == pytest.approx(1)
    assert amplification("m", weak, W).factor > 1e6


@pytest.fixture
def attached(tmp_path):
    """A checkpoint folder, the model, and an adapter of it."""

    def make(model, **config):
        folder = tiny_lm.save(tmp_path / "base", model)
        lk.attach(model, lk.LoraConfig(rank=2, **config))
        return folder, model, lk.capture(tiny.randomise_factors(model))

    return make


@pytest.mark.parametrize(
    "model, targets",
    [(tiny_lm.llama, "all-linear"), (tiny_lm.gpt2, ["c_attn", "wte"]), (lambda: tiny_lm.llama(tied=True), ["lm_head"])],
    ids=["llama", "gpt2", "tied"],
)
def test_relative_norms_agree_with_the_model(attached, model, targets):
    folder, live, made = attached(model(), targets=targets)
    found = relative_norms(made, open_weights(folder, made.updates))
    modules = dict(live.named_modules())
    for name, f in made.factors.items():
        W = modules[name].weight
        assert f.delta().shape == W.shape
        assert found[name] == pytest.approx(float(f.delta().norm() / W.norm()), rel=1e-5)


def test_weights_are_transposed_like_the_update(attached):
    folder, live, made = attached(tiny_lm.gpt2(), targets=["c_attn", "attn.c_proj", "wte"])
    weights = open_weights(folder, made.updates)
    for name, f in made.factors.items():
        W = dict(live.named_modules())[name].weight
        expected = torch.einsum("oi,oi->", f.scale * f.B.double() @ f.A.double(), weights.read(name).double())
        assert float(expected) == pytest.approx(float((f.delta().double() * W.double()).sum()), rel=1e-5)


def test_a_doras_norm_is_that_of_its_whole_change(attached):
    folder, live, made = attached(tiny_lm.llama(), targets=["q_proj"])
    name, f = next(iter(made.factors.items()))
    W = dict(live.named_modules())[name].weight.detach().double()
    V = W + f.scale * f.B.double() @ f.A.double()
    for magnitude, dim in ((torch.rand(W.shape[0], 1), 1), (torch.rand(1, W.shape[1]), 0)):
        dora = lk.Adapter(made.config, {name: Dora(f, magnitude)})
        expected = (V * magnitude / V.norm(dim=dim, keepdim=True) - W).norm() / W.norm()
        assert relative_norms(dora, open_weights(folder, {name: dora.updates[name]}))[name] == pytest.approx(
            float(expected), rel=1e-5
        )


def test_a_pipelines_weights_are_found_by_component(tmp_path):
    conv, linear, text = random(6, 4, 3, 3), random(5, 7), random(8, 8)
    for part, file, tensors in (
        ("unet", "diffusion_pytorch_model.safetensors", {"conv_in.weight": conv}),
        ("transformer", "diffusion_pytorch_model-00001-of-00001.safetensors", {"blocks.0.to_q.weight": linear}),
        ("text_encoder", "model.safetensors", {"text_model.encoder.layers.0.mlp.fc1.weight": text}),
    ):
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / file)
        (tmp_path / part / "config.json").write_text("{}")
    index = {"weight_map": {"blocks.0.to_q.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    components = {part: ["diffusers", "Any"] for part in ("unet", "transformer", "text_encoder")}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **components}))
    made = adapter(
        **{
            "unet.conv_in": Factors(random(2, 4, 3, 3), random(6, 2, 1, 1), 2.0, "conv"),
            "transformer.blocks.0.to_q": Factors(random(2, 7), random(5, 2), 2.0),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": Dense(text / 4),
        }
    )
    weights = open_weights(tmp_path, made.updates)
    found = relative_norms(made, weights)
    for (name, update), W in zip(made.updates.items(), (conv, linear, text), strict=True):
        assert found[name] == pytest.approx(float(update.delta().norm() / W.norm()), rel=1e-6)
        torch.testing.assert_close(weights.read(name), W.flatten(1).float())


def test_an_adapter_of_another_model_is_refused(attached, tmp_path):
    folder, *_ = attached(tiny_lm.llama())
    with pytest.raises(TargetError, match="not in"):
        open_weights(folder, {"model.layers.9.mlp.up_proj": None})
    wide = adapter(**{"model.layers.0.self_attn.q_proj": Dense(random(5, 5))})
    with pytest.raises(
        AdapterError,
        match=r"has a weight of \[32, 32\] in the base; the adapter's update \(weight \[5, 5\]\) is for \[5, 5\]",
    ):
        compare(wide, wide, base=folder)
    for update in (Factors(random(2, 5), random(5, 2), 1.0), Dense(random(5, 5))):
        small = adapter(**{"model.layers.0.self_attn.q_proj": update})
        with pytest.raises(AdapterError, match="weight"):
            relative_norms(small, open_weights(folder, small.updates))
