"""MLX's folder, both ways. mlx-lm's own lines (tuner/lora.py, tuner/dora.py) in float64 numpy are the judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lora import Factors
from lorakit.adapter.update import Update
from lorakit.errors import AdapterError
from lorakit.formats import mlx, peft
from lorakit.io.tensors import read_tensors

REAL = Path(__file__).parents[1] / "fixtures" / "mlx" / "0000100_adapters.safetensors"
Q, V, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj", "model.embed_tokens"


def factors(seed: int, inner=5, out=6, rank=3, alpha=6.0, dtype=torch.float32, **more) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, inner, generator=g).to(dtype), torch.randn(out, rank, generator=g).to(dtype)
    return Factors(A, B, alpha, **more)


def adapter(made: dict[str, Factors], **more) -> Adapter:
    return Adapter(lk.LoraConfig(rank=3, alpha=6, targets=["q_proj"], base="some/base", dropout=0.1), made, **more)


def read(folder: Path) -> Adapter:
    return mlx.read(folder / "adapters.safetensors", *read_tensors(folder / "adapters.safetensors"))


def as_mlx_computes(folder: Path) -> dict[str, np.ndarray]:
    """(scale · lora_bᵀ) lora_aᵀ, as mlx-lm's fuse has it: [out, in]."""
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    t = {k: v.astype(np.float64) for k, v in load_file(folder / "adapters.safetensors").items()}
    return {k[:-7]: (scale * t[k[:-1] + "b"].T) @ t[k].T for k in t if k.endswith(".lora_a")}


def same(ours: Update, theirs: Update) -> None:
    assert type(ours) is type(theirs)
    assert ours.tensors().keys() == theirs.tensors().keys()
    assert all(torch.equal(t, theirs.tensors()[name]) for name, t in ours.tensors().items())
    a, b = ours.factors, theirs.factors
    assert (a.alpha, a.kind, a.transposed, a.parts) == (b.alpha, b.kind, b.transposed, b.parts)


def test_the_real_file_is_read_with_the_alpha_given():
    tensors, header = read_tensors(REAL)
    assert mlx.fits(tensors)
    value = mlx.read(REAL, tensors, header, alpha=160)
    raw = load_file(REAL)
    assert len(value.factors) == 8
    for module, f in value.factors.items():
        a, b = (raw[f"{module}.lora_{h}"].astype(np.float64) for h in "ab")
        assert (f.A.shape, f.B.shape, f.scale) == ((8, 2304), (2304, 8), 20)
        np.testing.assert_allclose(f.delta().double().numpy(), 20 * (a @ b).T, atol=1e-6)
    assert (value.config.rank, value.config.alpha, value.config.targets) == (8, 160, ["q_proj", "v_proj"])


def test_the_real_file_without_its_config_says_what_is_missing():
    with pytest.raises(AdapterError, match=r"without its adapter_config.json, which holds the scale\n.*alpha = scale"):
        mlx.read(REAL, *read_tensors(REAL))


def test_what_is_written_computes_the_same_in_mlx_and_comes_back_equal(tmp_path):
    value = adapter({Q: factors(1), V: factors(2, rank=2, alpha=4.0), EMBED: factors(3, 9, 5, kind="embedding")})
    mlx.write(value, tmp_path)
    theirs = as_mlx_computes(tmp_path)
    for module, f in value.factors.items():
        expected = f.scale * f.B.double() @ f.A.double()
        np.testing.assert_allclose(theirs[module], expected.numpy(), atol=1e-12)
    again = read(tmp_path)
    for module, f in value.factors.items():
        same(f, again.factors[module])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["num_layers"] == -1
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 2.0,
        "dropout": 0.1,
        "keys": ["model.embed_tokens", "self_attn.q_proj", "self_attn.v_proj"],
    }
    assert (again.config.base, again.config.dropout) == ("some/base", 0.1)


modules = st.builds(
    factors,
    st.integers(0, 99),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 2.0, 6.0, 0.3, 32.0]),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(modules, min_size=1, max_size=4))
def test_mixed_ranks_alphas_and_precisions_keep_their_change_of_the_weight(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("mlx")
    value = adapter({f"model.layers.{n}.mlp.up_proj": f for n, f in enumerate(made)})
    mlx.write(value, folder)
    again = read(folder)
    for module, f in value.factors.items():
        g = again.factors[module]
        expected = f.scale * f.B.double() @ f.A.double()
        rounding = 2**-23 * f.scale * f.B.double().abs() @ f.A.double().abs()  # of B in float32
        assert ((g.scale * g.B.double() @ g.A.double() - expected).abs() <= rounding).all()
        assert torch.equal(f.A, g.A)


def test_one_scale_for_all_leaves_the_factors_bit_equal_in_half_precision(tmp_path):
    value = adapter({Q: factors(1, dtype=torch.bfloat16), V: factors(2, rank=7, alpha=14.0, dtype=torch.bfloat16)})
    mlx.write(value, tmp_path)
    for module, f in value.factors.items():
        same(f, read(tmp_path).factors[module])


def test_doras_magnitude_is_mlxs_m_and_comes_back(tmp_path):
    value = adapter(
        {
            Q: Dora(factors(1), torch.rand(6, 1) + 0.5),
            EMBED: Dora(factors(3, 9, 5, kind="embedding"), torch.rand(1, 9) + 0.5),
        }
    )
    mlx.write(value, tmp_path)
    t = load_file(tmp_path / "adapters.safetensors")
    assert (t[f"{Q}.m"].shape, t[f"{EMBED}.m"].shape) == ((6,), (9,))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    for module, update in value.updates.items():
        same(update, read(tmp_path).updates[module])


def test_saved_weights_and_the_packed_and_turned_ones_come_back(tmp_path, tiny_gpt2):
    config = lk.LoraConfig(
        rank=3,
        targets=["c_attn", "c_fc"],
        packed={"c_attn": [True, False, True]},
        bias="lora_only",
        save_modules=["ln_f"],
    )
    value = lk.capture(tiny.randomise_factors(lk.attach(tiny_gpt2, config)))
    mlx.write(value, tmp_path)
    assert "transformer.h.0.attn.c_attn.linear.bias" in load_file(tmp_path / "adapters.safetensors")
    again = read(tmp_path)
    for module, f in value.factors.items():
        same(f, again.factors[module])
    assert {n: t.tolist() for n, t in again.saved.items()} == {n: t.tolist() for n, t in value.saved.items()}
    assert dict(again.metadata) == dict(value.metadata)


def test_the_two_formats_that_share_a_configs_name_are_told_apart(tmp_path):
    value = adapter({Q: factors(1)})
    mlx.write(value, tmp_path / "m")
    value.save(tmp_path / "p")
    assert mlx.is_mlx(tmp_path / "m")
    assert not peft.is_peft(tmp_path / "m")
    assert peft.is_peft(tmp_path / "p")
    assert not mlx.is_mlx(tmp_path / "p")


def test_what_mlx_cannot_hold_is_listed_and_not_written(tmp_path):
    ones = torch.ones(2, 2)
    value = adapter(
        {
            Q: Dora(factors(1), torch.ones(1, 5)),
            V: factors(2),
            "conv": Factors(torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1), 2.0, "conv"),
            "x": Loha(ones, ones, ones, ones, 1.0),
        },
        embeddings={"<s>": torch.ones(3)},
        saved={"c.weight": torch.ones(1, 1, 2)},
    )
    lost = "\n".join(mlx.losses(value))
    for said in (
        "another kind (x)",
        "1 textual-inversion embeddings",
        "1 convolutions (conv)",
        "all modules are DoRA or none",
        "each column",
        "c.weight",
    ):
        assert said in lost
    with pytest.raises(AdapterError, match="cannot hold all"):
        mlx.write(value, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'; lorakit reads lora and dora"),
        ({"lora_parameters": {"rank": 3}}, "lora_parameters.scale is None"),
        ({"lora_parameters": {"scale": "2"}}, "lora_parameters.scale is '2'"),
        ({"lora_parameters": {"scale": -1}}, "lora_parameters.scale is -1"),
        ({"lora_parameters": {"scale": float("nan")}}, "lora_parameters.scale is nan"),
        ({"lora_parameters": None}, "lora_parameters.scale is None"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, change, said):
    mlx.write(adapter({Q: factors(1)}), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=said):
        read(tmp_path)


def test_a_header_of_ours_that_holds_other_things_does_no_harm(tmp_path):
    mlx.write(adapter({Q: factors(1)}), tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors, _ = read_tensors(path)
    for told in ({"transposed": 5, "embeddings": 5}, {"packed": 5}, {"embeddings": [1, {}], "transposed": {"a": 1}}):
        save_file(tensors, path, {"lorakit": json.dumps(told)})
        assert read(tmp_path).rank == 3
    save_file(tensors, path, {"lorakit": json.dumps({"packed": {Q: [True, True]}})})
    with pytest.raises(AdapterError, match="is packed as"):
        read(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({f"{Q}.lora_b": None}, "has a lora_a and no lora_b"),
        (
            {f"{Q}.lora_a": None, "x.lora_a": torch.ones(2, 1), "x.lora_b": torch.ones(1, 2)},
            "has a lora_b and no lora_a",
        ),
        ({f"{Q}.lora_b": torch.ones(4, 6)}, r"lora_a \[5, 3\], lora_b \[4, 6\]; expected"),
        ({f"{Q}.lora_a": torch.ones(2, 5, 3)}, "stacked experts are not supported"),
        ({f"{Q}.lora_a": torch.full((5, 3), float("nan"))}, "not finite"),
        ({f"{Q}.lora_a": torch.ones(5, 3, dtype=torch.int32)}, "floating-point"),
        ({f"{Q}.m": torch.ones(7)}, "magnitude has shape"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, change, said):
    mlx.write(adapter({Q: factors(1)}), tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors, header = read_tensors(path)
    save_file({k: v for k, v in (tensors | change).items() if v is not None}, path, header)
    with pytest.raises(AdapterError, match=said):
        read(tmp_path)
