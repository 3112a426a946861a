"""The loss of a frozen output layer in chunks, against the plain lines over all logits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from against import DTYPES, assert_as_exact, kept, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lorakit.ops import IGNORE_INDEX
from lorakit.ops.fused import cross_entropy
from lorakit.ops.fused.cross_entropy import linear_cross_entropy, reference


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "ROWS", 3)
    monkeypatch.setattr(cross_entropy, "BYTES", 0)


def targets(rows: int, vocabulary: int, left_out: Sequence[int] = ()) -> torch.Tensor:
    made = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    for i in left_out:
        made[i] = IGNORE_INDEX
    return made


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 8),
    width=st.integers(1, 5),
    vocabulary=st.integers(1, 9),
    bias=st.booleans(),
    strided=st.booleans(),
    data=st.data(),
)
def test_losses_and_gradients_are_those_of_the_plain_lines(rows, width, vocabulary, bias, strided, data):
    h = randn(rows, width)
    h = (torch.stack([h, h], dim=-1)[..., 0] if strided else h).requires_grad_()
    W, b = randn(vocabulary, width, seed=1), randn(vocabulary, seed=3) if bias else None
    wanted = targets(rows, vocabulary, [i for i in range(rows) if data.draw(st.booleans())])
    ours, plain = linear_cross_entropy(h, W, b, wanted), reference(h, W, b, wanted)
    torch.testing.assert_close(ours, plain)
    g = randn(rows, seed=5)
    torch.testing.assert_close(*(torch.autograd.grad((losses * g).sum(), h)[0] for losses in (ours, plain)))


def test_gradcheck():
    h, W, b, wanted = randn(7, 4).requires_grad_(), randn(6, 4, seed=1), randn(6, seed=2), targets(7, 6, [2])
    assert gradcheck(lambda h: linear_cross_entropy(h, W, b, wanted), (h,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_near_to_float64_maths_as_the_plain_lines(dtype):
    h, W, wanted = (
        randn(64, 48, dtype=dtype).requires_grad_(),
        randn(200, 48, seed=1, dtype=dtype) / 7,
        targets(64, 200),
    )
    exact_h = h.detach().double().requires_grad_()
    found = [
        linear_cross_entropy(h, W, None, wanted),
        reference(h, W, None, wanted),
        reference(exact_h, W.double(), None, wanted),
    ]
    assert found[0].dtype == torch.float32
    assert_as_exact(*([losses] for losses in found))
    assert_as_exact(
        *([torch.autograd.grad(losses.mean(), of)[0]] for losses, of in zip(found, (h, h, exact_h), strict=True))
    )


def test_a_token_that_is_all_but_impossible_has_a_finite_loss():
    h, W = torch.tensor([[1.0]]), torch.tensor([[300.0], [0.0]])
    assert linear_cross_entropy(h, W, None, torch.tensor([1])).item() == 300


def test_what_is_not_a_number_shows_unless_it_is_left_out():
    h = torch.tensor([[1.0], [float("nan")], [float("nan")]]).requires_grad_()
    losses = linear_cross_entropy(h, torch.ones(2, 1), None, torch.tensor([0, 1, IGNORE_INDEX]))
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert h.grad.isnan().flatten().tolist() == [False, True, False]


def test_only_a_gradient_as_large_as_the_input_is_kept():
    h, W = randn(10, 4, dtype=torch.bfloat16).requires_grad_(), randn(50, 4, seed=1, dtype=torch.bfloat16)
    assert kept(lambda: linear_cross_entropy(h, W, None, targets(10, 50)), [h, W]) == [(torch.bfloat16, (10, 4))]


def test_a_chunk_is_as_large_as_the_cache_takes(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BYTES", 4 * 50 * 5)
    made, real = [], cross_entropy._linear
    monkeypatch.setattr(cross_entropy, "_linear", lambda x, *rest: made.append(len(x)) or real(x, *rest))
    linear_cross_entropy(randn(11, 3), randn(50, 3, seed=1), None, targets(11, 50))
    assert made == [5, 5, 1]


def test_many_rows_go_in_few_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNKS", 2)
    h, W, wanted = randn(11, 3), randn(5, 3, seed=1), targets(11, 5)
    made, real = [], cross_entropy._linear
    monkeypatch.setattr(cross_entropy, "_linear", lambda x, *rest: made.append(len(x)) or real(x, *rest))
    torch.testing.assert_close(linear_cross_entropy(h, W, None, wanted), reference(h, W, None, wanted))
    assert made == [6, 5]


def test_without_gradients_none_is_computed():
    h, W = randn(4, 3), randn(5, 3, seed=1)
    assert linear_cross_entropy(h, W, None, targets(4, 5)).grad_fn is None
    torch.testing.assert_close(linear_cross_entropy(h, W, None, targets(4, 5)), reference(h, W, None, targets(4, 5)))


def test_a_target_beyond_the_vocabulary_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(randn(2, 3), randn(5, 3), None, torch.tensor([0, 5]))
