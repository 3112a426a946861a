"""Products of sorted tokens with each expert's matrix, against one matrix for each token."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import experts as file
from lorakit.ops.experts import Routed, low_rank, product, reference

E, IN, OUT = 5, 16, 24


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def routed(tokens: int = 7, k: int = 2) -> tuple[torch.Tensor, Routed]:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:k] for _ in range(tokens)])  # none for the last
    return index, Routed.of(index, E)


@pytest.fixture(params=["grouped", "expert by expert"])
def way(request, monkeypatch) -> None:
    if request.param != "grouped":
        monkeypatch.setattr(file, "_supports", lambda x: False)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_pairs_are_sorted_and_find_back(tokens):
    index, found = routed(tokens)
    assert torch.equal(found.expert, index.flatten().sort().values)
    assert torch.equal(index.flatten()[found.order], found.expert)
    assert torch.equal(found.order // 2, found.token)
    assert found.ends.tolist() == [int((found.expert <= e).sum()) for e in range(E)]
    values = randn(tokens, 2, OUT)
    weights = torch.rand(tokens, 2)
    expected = (values * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(found.summed(values.flatten(0, 1)[found.order], weights), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_is_each_tokens_own(way, dtype, transposed):
    _, found = routed()
    x, W = randn(14, IN, dtype=dtype), randn(E, *((IN, OUT) if transposed else (OUT, IN)))
    tolerance = 2e-1 if dtype == torch.bfloat16 else 1e-5
    y = product(x, W, found, transposed)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(x, W, found.expert, transposed), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_a_low_rank_product_and_its_gradients_are_those_of_the_reference(way, rank):
    _, found = routed()
    tensors = [randn(14, IN), randn(E, rank, IN), randn(E, OUT, rank)]
    results = []
    for of in (
        lambda x, A, B: low_rank(x, A, B, 0.5, found),
        lambda x, A, B: 0.5 * reference(reference(x, A, found.expert), B, found.expert),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = of(*leaves)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not results[0][2][E - 1].any()  # the expert without tokens


def test_gradcheck(way):
    _, found = routed(4)
    leaves = [randn(*s, dtype=torch.float64).requires_grad_() for s in ((8, IN), (E, 3, IN), (E, OUT, 3))]
    assert torch.autograd.gradcheck(lambda x, A, B: low_rank(x, A, B, 2.0, found), leaves)


def test_some_of_the_pairs_keep_their_experts(way):
    _, found = routed(20)
    chosen = torch.tensor([0, 3, 4, 11, 30, 39])
    x, W = randn(40, IN), randn(E, OUT, IN)
    torch.testing.assert_close(product(x[chosen], W, found.of_pairs(chosen)), product(x, W, found)[chosen])
    none = found.of_pairs(chosen[:0])
    assert product(x[:0], W, none).shape == (0, OUT)
