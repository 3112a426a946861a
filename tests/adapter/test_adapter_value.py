"""An adapter as a value: ΔW, scale, checks."""

from __future__ import annotations

import pytest
import tiny
import torch
from made_adapters import packed

import lorakit as lk
from lorakit.errors import AdapterError


def factors(kind: str = "linear", **options) -> lk.Factors:
    made = torch.Generator().manual_seed(0)
    shapes = {"linear": ((3, 5), (4, 3)), "embedding": ((3, 9), (4, 3)), "conv": ((3, 2, 3, 3), (4, 3, 1, 1))}[kind]
    return lk.Factors(*(torch.randn(s, generator=made) for s in shapes), 6.0, kind, **options)


def test_delta_is_scale_times_b_a_in_the_weights_own_layout():
    f = factors()
    torch.testing.assert_close(f.delta(), 2 * f.B @ f.A)
    torch.testing.assert_close(factors(transposed=True).delta(), 2 * (f.B @ f.A).T)
    e = factors("embedding")
    torch.testing.assert_close(e.delta(), 2 * (e.B @ e.A).T)
    c = factors("conv")
    torch.testing.assert_close(c.delta(), 2 * torch.einsum("or,rikl->oikl", c.B[..., 0, 0], c.A))
    torch.testing.assert_close(factors(rslora=True).delta(), 6 / 3**0.5 * f.B @ f.A)


def test_the_rank_of_a_packed_projection_is_that_of_one_part():
    f = lk.Factors(torch.randn(4, 8), torch.zeros(12, 4), 6.0, parts=(True, False, True))
    assert (f.rank, f.scale) == (2, 3.0)


def test_a_value_counts_its_rank_and_parameters():
    value = lk.Adapter(lk.LoraConfig(rank=3), {"a": factors(), "b": factors("conv")}, {"head.bias": torch.zeros(7)})
    assert value.rank == 3
    assert value.parameters == 15 + 12 + 54 + 12 + 7
    assert repr(value) == "Adapter(rank 3, 2 modules, 100 parameters, 1 saved weights)"


def test_another_precision_is_a_new_value():
    value = lk.Adapter(
        lk.LoraConfig(rank=3), {"a": factors()}, {"x": torch.zeros(2), "steps": torch.zeros(2, dtype=torch.int64)}
    )
    half = value.to(torch.bfloat16)
    assert half.factors["a"].A.dtype == half.saved["x"].dtype == torch.bfloat16
    assert half.saved["steps"].dtype == torch.int64
    assert value.factors["a"].A.dtype == torch.float32
    assert half.factors["a"].alpha == 6.0


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lk.Factors(torch.zeros(3, 5), torch.zeros(4, 2), 6.0), "expected the same"),
        (lk.Factors(torch.zeros(3), torch.zeros(4, 3), 6.0), "at least two axes"),
        (lk.Factors(torch.zeros(3, 0), torch.zeros(4, 3), 6.0), "none of them empty"),
        (lk.Factors(torch.zeros(3, 5, 1), torch.zeros(4, 3), 6.0), "should be matrices"),
        (
            lk.Factors(torch.zeros(70000, 5, device="meta"), torch.zeros(4, 70000, device="meta"), 6.0),
            "rank 70000 is beyond",
        ),
        (lk.Factors(torch.zeros(3, 5, dtype=torch.int8), torch.zeros(4, 3), 6.0), "floating-point"),
        (lk.Factors(torch.zeros(3, 5), torch.zeros(4, 3), 0.0), "alpha is 0.0"),
        (lk.Factors(torch.zeros(3, 5), torch.zeros(4, 3), float("nan")), "alpha is nan"),
        (lk.Factors(torch.zeros(3, 5), torch.zeros(4, 3), float("inf")), "alpha is inf"),
        (lk.Factors(torch.zeros(3, 5) * float("nan"), torch.zeros(4, 3), 6.0), "A holds 15 values that are not finite"),
    ],
)
def test_malformed_factors_are_refused_by_name(wrong, said):
    with pytest.raises(AdapterError, match=f"adapter factors of 'layer.q': .*{said}"):
        lk.Adapter(lk.LoraConfig(), {"layer.q": wrong}).check()


def test_an_adapter_of_whole_weights_alone_is_one(tmp_path):
    value = lk.Adapter(lk.LoraConfig(targets=["lin0"], save_modules=["head"]), {}, {"head.weight": torch.randn(4, 12)})
    value.save(tmp_path)
    model = lk.attach(tiny.mlp(), lk.Adapter.load(tmp_path))
    assert torch.equal(model.head.weight, value.saved["head.weight"])


def test_the_zeros_between_the_blocks_of_a_packed_projection_are_no_parameters():
    f = packed(rank=2)  # parts of 4 rows, two of three adapted: A [4, 9], B [12, 4]
    assert f.parameters == 4 * 9 + 2 * 4 * 2
    assert lk.Adapter(lk.LoraConfig(rank=2), {"qkv": f}).parameters == f.parameters
    plain = factors()
    assert plain.parameters == plain.A.numel() + plain.B.numel()
