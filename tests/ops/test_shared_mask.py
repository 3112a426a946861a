"""One mask for all readers of a tensor: who shares it, for how long it is kept, and gradient checkpointing that finds
it again.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from against import randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.ops import shared_mask
from lorakit.ops.dropout import Mask, draw_mask, draw_seed, masked
from lorakit.ops.shared_mask import REMEMBERED, mask_for

Q, K, V = nn.Module(), nn.Module(), nn.Module()


def same(one: Mask, other: Mask) -> bool:
    return one.p == other.p and torch.equal(one.state, other.state)


def entries() -> int:
    gc.collect()
    return len(shared_mask._inputs.views)


# ---- who shares ----


def test_all_readers_of_a_tensor_get_one_mask_object():
    x = randn(50, 8)
    first = mask_for(x, 0.5, Q)
    assert mask_for(x, 0.5, K) is first
    assert mask_for(x, 0.5, V) is first


def test_each_reader_draws_a_seed_whether_it_shares_or_not():
    x, after = randn(50, 8), []
    for inputs in ([x, x, x], [x, x.clone(), x.clone()]):
        torch.manual_seed(0)
        for t, reader in zip(inputs, (Q, K, V), strict=True):
            mask_for(t, 0.5, reader)
        after.append(draw_seed())
    torch.manual_seed(0)
    after.append([draw_seed() for _ in range(4)][-1])
    assert len(set(after)) == 1


def test_the_first_readers_seed_counts():
    x, masks = randn(50, 8), []
    for readers in ([Q, K], [K]):
        torch.manual_seed(3)
        masks.append(mask_for(x.clone(), 0.5, readers[0]))
    assert same(*masks)


def test_a_detached_tensor_is_the_same():
    x = randn(50, 8).requires_grad_() * 1
    first = mask_for(x, 0.5, Q)
    assert mask_for(x.detach(), 0.5, K) is first
    assert mask_for(x.view(50, 8), 0.5, V) is first


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a part": lambda x: x[10:],
    "a part of the same shape and strides": lambda x: x.as_strided((40, 8), (8, 1), 8),
    "another shape": lambda x: x.view(20, 20),
    "turned": lambda x: x.as_strided((50, 8), (1, 50)),
    "another type": lambda x: x.view(torch.int64),
    "a copy": lambda x: x.clone(),
    "written into": lambda x: x.add_(1),
    "written into through a view": lambda x: (x[0].zero_(), x)[1],
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_the_same_tensor_has_a_mask_of_its_own(other):
    x = randn(50, 8)
    first = mask_for(x[:40] if "part" in other else x, 0.5, Q)
    again = mask_for(OTHERS[other](x), 0.5, K)
    assert again is not first
    assert not same(again, first)


def test_another_p_is_another_mask():
    x = randn(50, 8)
    one, other = mask_for(x, 0.5, Q), mask_for(x, 0.25, K)
    assert (one.p, other.p) == (0.5, 0.25)
    assert mask_for(x, 0.5, K) is one
    assert mask_for(x, 0.25, V) is other


def test_a_reader_that_comes_again_starts_a_pass_with_a_new_mask():
    x, passes = randn(50, 8), []
    for _ in range(3):
        masks = [mask_for(x, 0.5, reader) for reader in (Q, K, V)]
        assert masks[0] is masks[1] is masks[2]
        passes.append(masks[0])
    assert not any(same(a, b) for a, b in itertools.combinations(passes, 2))


def test_one_reader_alone_gets_a_new_mask_each_time():
    x = randn(50, 8)
    masks = [mask_for(x, 0.5, Q) for _ in range(3)]
    assert not any(same(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
def test_without_gradients_masks_are_shared_too(made):
    with made():
        x = randn(50, 8)
        first = mask_for(x, 0.5, Q)
        assert mask_for(x, 0.5, K) is first
        assert not same(mask_for(x, 0.5, Q), first)


def test_masks_of_different_inputs_and_passes_are_independent():
    xs, masks = [torch.ones(40_001) for _ in range(4)], []
    torch.manual_seed(0)
    for _ in range(2):
        masks += [masked(x, mask_for(x, 0.5, Q)) for x in xs]
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one == other).double().mean()) - 0.5) < 5 * 0.5 / 40_001**0.5


# ---- for how long ----


def test_a_freed_tensor_leaves_nothing():
    before = entries()
    x = randn(50, 8)
    mask_for(x, 0.5, Q), mask_for(x[1:], 0.5, Q)
    assert entries() == before + 1
    view = x[2:]
    del x
    assert entries() == before + 1, "a view keeps the storage"
    del view
    assert entries() == before


def test_a_tensor_freed_by_another_thread_leaves_nothing():
    before, held = entries(), [randn(50, 8)]
    mask_for(held[0], 0.5, Q)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert entries() == before


def test_an_address_that_is_used_again_is_another_tensor():
    for _ in range(200):
        x = torch.empty(8, 8)
        first = mask_for(x, 0.5, Q)
        assert mask_for(x, 0.5, K) is first
        del x


def views_of(x: Tensor) -> dict:
    return shared_mask._inputs.views[x.untyped_storage()._cdata][1]


def test_a_tensor_that_is_read_in_thousands_of_passes_takes_bounded_memory():
    x = randn(2, 2)
    for _ in range(REMEMBERED + 500):
        mask_for(x, 0.5, Q)
    (readers,) = views_of(x).values()
    assert len(readers.seeds) == REMEMBERED
    assert len(readers.modules) == 1


def test_a_tensor_that_is_written_into_between_thousands_of_passes_takes_bounded_memory():
    x = randn(2, 2)
    for _ in range(5000):
        mask_for(x.add_(1), 0.5, Q)
    assert len(views_of(x)) == 1, "that of the last version"


def test_threads_do_not_disturb_each_other():
    """On a tensor of its own a thread sees its own passes. On one that all read a pass may begin between two readers of
    a thread, but each mask is that of the seed remembered for its draw, so gradient checkpointing finds it.
    """
    shared, together = [randn(50, 8) for _ in range(400)], threading.Barrier(4, timeout=60)
    found, given = {}, [[] for _ in shared]

    def work(i: int) -> None:
        own, rounds = randn(50, 8, seed=i), []
        for x, masks in zip(shared, given, strict=True):
            together.wait()  # all are the first to read x
            first = mask_for(own, 0.5, Q)
            masks.append(mask_for(x, 0.5, Q))
            rounds.append(mask_for(own, 0.5, K) is first)
            masks.append(mask_for(x, 0.5, K))
        found[i] = rounds

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of a call
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert sorted(found.items()) == [(i, [True] * 400) for i in range(4)]
    for x, masks in zip(shared, given, strict=True):
        (readers,) = views_of(x).values()
        remembered = Counter(draw_mask(x, 0.5, seed).state.numpy().tobytes() for seed in readers.seeds.values())
        assert Counter(mask.state.numpy().tobytes() for mask in masks) == remembered
        assert remembered.total() == 8


# ---- in models, and under gradient checkpointing ----


class Attention(nn.Module):
    """Three linears of one input, and one of theirs; `outside`: those that run before the part that is checkpointed."""

    def __init__(self, checkpointed: bool = False, reentrant: bool = False, outside: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.checkpointed, self.reentrant, self.outside = checkpointed, reentrant, outside

    def forward(self, x: Tensor) -> Tensor:
        before = [getattr(self, name)(x) for name in self.outside]

        def rest(x: Tensor, *before: Tensor) -> Tensor:
            q, k, v = (*before, *(getattr(self, name)(x) for name in "qkv" if name not in self.outside))
            return x + self.o(q * torch.tanh(k) + v)

        return checkpoint(rest, x, *before, use_reentrant=self.reentrant) if self.checkpointed else rest(x, *before)


def model(layers: int = 2, **how) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(Attention(**how) for _ in range(layers))).double()
    lk.attach(made, lk.LoraConfig(rank=2, targets=["q", "k", "v", "o"], dropout=0.5))
    made = lk_random(made)
    return made.train()


def lk_random(made: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def trained(
    made: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], between: Callable[[], object] = lambda: None
) -> list[Tensor]:
    of = [p for p in made.parameters() if p.requires_grad]
    for p in of:
        p.grad = None
    torch.manual_seed(5)
    loss = run(made, x)
    between()
    loss.backward()
    return [p.grad.clone() for p in of]


def once(made: nn.Module, x: Tensor) -> Tensor:
    return made(x).square().sum()


def twice(made: nn.Module, x: Tensor) -> Tensor:
    """Two passes over the same tensor before one backward, as in R-Drop or SimCSE."""
    return made(x).square().sum() + made(x).sin().sum()


WAYS = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])


@WAYS
@pytest.mark.parametrize("run", [once, twice])
@pytest.mark.parametrize("outside", ["", "q", "qk"])
def test_checkpointing_gives_the_gradients_of_the_same_masks(reentrant, run, outside):
    x = randn(3, 4, 6).requires_grad_()
    expected = trained(model(outside=outside), x, run)
    found = trained(model(outside=outside, checkpointed=True, reentrant=reentrant), x, run)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


@WAYS
@pytest.mark.parametrize("run", [once, twice])
def test_checkpointing_of_a_raw_input_that_takes_no_gradients(reentrant, run):
    x = randn(3, 4, 6)
    expected = trained(model(), x, run)
    made = model(checkpointed=True, reentrant=reentrant)
    made[0].checkpointed = not reentrant  # the reentrant kind needs an input that takes gradients
    for a, e in zip(trained(made, x, run), expected, strict=True):
        torch.testing.assert_close(a, e)


@WAYS
@pytest.mark.parametrize("run", [once, twice])
def test_a_pass_without_gradients_between_forward_and_backward_changes_nothing(reentrant, run):
    x = randn(3, 4, 6).requires_grad_()
    expected = trained(model(), x, run)
    made = model(checkpointed=True, reentrant=reentrant)

    def more() -> None:
        with torch.no_grad():
            made(x)

    for a, e in zip(trained(made, x, run, more), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("outside", ["", "q"])
def test_backward_may_run_in_another_thread(outside):
    """As it does on an accelerator, where torch has a thread for each device."""
    x = randn(3, 4, 6).requires_grad_()
    expected = trained(model(outside=outside), x, once)
    made = model(outside=outside, checkpointed=True)
    of = [p for p in made.parameters() if p.requires_grad]
    torch.manual_seed(5)
    loss = once(made, x)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for p, e in zip(of, expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_training_leaves_no_entries_behind():
    before = entries()
    for checkpointed in (False, True):
        trained(model(checkpointed=checkpointed), randn(3, 4, 6).requires_grad_(), twice)
    assert entries() == before


def test_linears_of_one_input_have_equal_masks_and_others_independent_ones():
    """With A of ones, B one of each and W zero, an output counts what was kept of its input."""
    made = nn.ModuleDict({n: nn.Linear(64, 1, bias=False) for n in "qkv"})
    lk.attach(made, lk.LoraConfig(rank=1, alpha=1, targets=["q", "k", "v"], dropout=0.5))
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(float(p.requires_grad))
    made.train()
    x, other = torch.ones(2000, 64), torch.ones(2000, 64)
    q, k, v = (made[n](x) for n in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    for another in (made["q"](other), made["q"](x)):
        correlation = torch.corrcoef(torch.cat([q, another], dim=1).T)[0, 1]
        assert abs(float(correlation)) < 5 / 2000**0.5


def test_a_parameter_is_an_input_like_any_other():
    x = torch.nn.Parameter(torch.ones(64, 64))
    kept = masked(x.detach(), mask_for(x, 0.5, object())).mean()
    assert 0.45 < float(kept) < 0.55
    one, other = object(), object()
    assert mask_for(x, 0.5, one).state is mask_for(x, 0.5, other).state


def test_the_default_device_has_no_part_in_it():
    x = torch.ones(8, 8)
    torch.manual_seed(3)
    expected = masked(x, mask_for(x, 0.5, object()))
    torch.manual_seed(3)
    with torch.device("meta"):
        mask = mask_for(x.clone(), 0.5, object())
    assert torch.equal(masked(x, mask), expected)
