"""Stacks: what is copied when, where it lies, who makes room, and that nothing of a detached adapter stays."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.layers.batched import stacks as stacks_module
from lorakit.layers.batched.stacks import Layout, Stack
from lorakit.model.route import expect

RANKS = {"a": 1, "b": 2, "c": 3, "d": 2, "e": 1}


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The adapters that were copied into a stack, in order."""
    copied: list[str] = []
    write = Stack.write

    def noted(self, child, layer):
        copied.append(child.removeprefix("lora_"))
        write(self, child, layer)

    monkeypatch.setattr(Stack, "write", noted)
    return copied


def build(names: str = "abcde", trainable: bool = False, size: int = 6) -> tuple[nn.Module, torch.Tensor]:
    """One linear, 8 -> 6, with adapters of these names, and an input of a row for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double().eval()
    for name in names:
        attach(model, name, trainable)
    return model, torch.randn(size, 3, 8, dtype=torch.float64)


def attach(model: nn.Module, name: str, trainable: bool = False, rank: int | None = None) -> None:
    lk.attach(model, lk.LoraConfig(rank=rank or RANKS[name], alpha=3, targets=["0"]), name=name, trainable=trainable)
    with torch.no_grad():
        getattr(model[0], f"lora_{name}").B.normal_()


def check(model: nn.Module, x: torch.Tensor, choices: list) -> None:
    """The routed batch against its rows one by one."""
    expected = []
    with torch.no_grad():
        for n, choice in enumerate(choices):
            lk.activate(model, choice)
            expected.append(model(x[n]))
        with lk.route(model, choices):
            torch.testing.assert_close(model(x[: len(choices)]), torch.stack(expected))


def stack(model: nn.Module) -> Stack:
    return model._lorakit.routes.stacks.of[model[0]]


def inside(model: nn.Module) -> set[str]:
    return {child.removeprefix("lora_") for child in stack(model).snapshots}


# What is copied


def test_a_mix_that_changes_copies_only_what_is_new(written):
    model, x = build()
    for choices, copied in (
        (["a", "b"], "ab"),
        (["b", "a", None], ""),
        (["a", "c"], "c"),
        (["c", "b", {"a": 0.5, "c": 2.0}], ""),
        (["d", "e"], "ed"),
        (["a", "b"], ""),
    ):
        written.clear()
        check(model, x, choices)
        assert sorted(written) == sorted(copied)
    assert inside(model) == set("abcde")


@pytest.mark.parametrize("tokens", [1, 70])
def test_mixes_in_any_order_of_places_for_few_and_many_tokens(tokens):
    model, _ = build()
    x = torch.randn(6, tokens, 8, dtype=torch.float64)
    for choices in (
        ["c", "a"],
        ["e", "c", "d"],
        ["b", "e", {"b": 0.5, "e": -1.0, "a": 2.0}],
        ["d"] * 6,
        ["a", "b", "c", "d", "e", None],
    ):
        check(model, x, choices)
        check(model.float(), x.float(), choices)
        model.double()


def test_16_bits_take_what_lies_apart_side_by_side():
    model, x = build()
    model, x = model.bfloat16(), x.bfloat16()
    for choices in (["a", "b", "c", "d", "e"], ["c", "e", "a"], ["a", "d", None, "d"]):
        expected = []
        with torch.inference_mode():
            for n, choice in enumerate(choices):
                lk.activate(model, choice)
                expected.append(model(x[n]))
            with lk.route(model, choices):
                torch.testing.assert_close(model(x[: len(choices)]), torch.stack(expected), atol=0.1, rtol=0.05)
    with torch.inference_mode():  # a change is seen by the copy too
        model[0].lora_a.B.mul_(3.0)
        lk.activate(model, "a")
        alone = model(x[0])
        with lk.route(model, choices):
            torch.testing.assert_close(model(x[:4])[0], alone, atol=0.2, rtol=0.05)


def test_one_changed_factor_copies_one_adapter_to_the_same_place(written):
    model, x = build("abc")
    check(model, x, ["a", "b", "c"])
    factors, first, layout = model[0].lora_a, stack(model), stack(model).layout

    def changed(*expected: str) -> None:
        written.clear()
        check(model, x, ["a", "b", "c"])
        assert written == list(expected)
        assert stack(model) is first
        assert stack(model).layout is layout

    changed()
    with torch.no_grad():
        factors.B.mul_(2.0)
    changed("a")
    factors.A.data = factors.A.data * 3.0
    changed("a")
    factors.A = nn.Parameter(factors.A.detach() * 0.5, requires_grad=False)
    changed("a")
    changed()
    with torch.inference_mode():
        written.clear()
        with lk.route(model, ["a", "b", "c"]):
            model(x[:3])
        assert written == []


def test_fixed_adapters_are_not_compared_with_what_was_written_before_or_since(written):
    model, x = build("abc")
    check(model, x, ["a", "b", "c"])
    with torch.no_grad():
        model[0].lora_a.B.mul_(2.0)
    expect(model, 5, fixed=True)
    written.clear()
    check(model, x, ["a", "b", "c"])  # what changed before that counts
    assert sorted(written) == ["a", "b", "c"]
    written.clear()
    check(model, x, ["c", "a", "b", "a"])
    with torch.no_grad(), lk.route(model, ["a", "b", "c"]):
        before = model(x[:3])
        model[0].lora_a.B.mul_(2.0)  # against the promise
        assert torch.equal(model(x[:3]), before)
    assert written == []


@pytest.mark.parametrize("others", ["bc", "bcde"])
def test_a_fixed_adapter_that_comes_back_under_its_name_is_written_again(written, others):
    model, x = build("a" + others)
    expect(model, 5, fixed=True)
    mix = ["a", *others]
    check(model, x, mix)
    lk.detach(model, "b")
    check(model, x, [name for name in mix if name != "b"])
    attach(model, "b")  # of the same rank, so that it gets the same place
    written.clear()
    check(model, x, mix)
    assert written == ["b"]


def test_a_fixed_adapter_that_comes_back_as_another_kind_is_computed_so():
    model, x = build("abc")
    expect(model, 5, fixed=True)
    check(model, x, ["a", "b", "c"])
    lk.detach(model, "b")
    config = lk.LoraConfig(rank=2, alpha=3, targets=["0"], variant="loha")
    lk.attach(model, config, name="b", trainable=False)
    with torch.no_grad():
        for parameter in model[0].lora_b.parameters():
            parameter.normal_()
    check(model, x, ["a", "b", "c"])
    check(model, x, ["a", "b", "c"])


def test_what_depends_on_the_adapters_alone_outlives_another_order_of_rows():
    model, x = build("abc")
    check(model, x, ["a", "b", "c"])
    found = {id(uses) for routing in model._lorakit.routes.last.values() for uses in routing.of_children.uses.values()}
    check(model, x, ["c", "a", "a", "b"])
    routings = model._lorakit.routes.last.values()
    assert len(routings) > 1
    assert {id(uses) for routing in routings for uses in routing.of_children.uses.values()} == found


def test_another_precision_is_another_stack():
    model, x = build("abc")
    check(model, x, ["a", "b", "c"])
    first = stack(model)
    check(model.float(), x.float(), ["a", "b"])
    assert stack(model) is not first
    assert stack(model).A.dtype == torch.float32


def test_trained_factors_are_copied_at_each_use_and_frozen_ones_beside_them_are_not(written):
    model, x = build("ab")
    attach(model, "c", trainable=True)
    for _ in range(2):
        written.clear()
        check(model, x, ["a", "c"])
        assert set(written) - {"a"} == {"c"}
        model[0].lora_c.B.data.mul_(2.0)  # as some optimizers write: not counted by autograd
    assert written == ["c"]


def test_factors_made_in_inference_mode_are_copied_at_each_use():
    with torch.inference_mode():
        model, x = build("ab")
        for _ in range(2):
            check(model, x, ["a", "b"])
            model[0].lora_a.B.mul_(2.0)


def test_a_stack_made_in_inference_mode_is_written_outside_of_it():
    model, x = build("abc")
    with torch.inference_mode(), lk.route(model, ["a", "b"]):
        model(x[:2])
    check(model, x, ["a", "c"])
    check(model, x, ["a", "b", "c"])


# Attach and detach


def test_attaching_and_detaching_another_leaves_every_stack_as_it_is(written):
    model = tiny.llama().eval()
    for name in "abc":
        lk.attach(model, lk.LoraConfig(rank=RANKS[name], targets="all-linear"), name=name, trainable=False)

    def step() -> torch.Tensor:
        with torch.no_grad(), lk.route(model, ["a", "b"]):
            return tiny.logits(model)

    before = step()
    stacks = dict(model._lorakit.routes.stacks.of)
    addresses = {layer: s.A.data_ptr() for layer, s in stacks.items()}
    assert len(stacks) == 14
    written.clear()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"]), name="new", trainable=False)
    assert torch.equal(step(), before)
    lk.detach(model, "new")
    assert torch.equal(step(), before)
    lk.detach(model, "c")
    assert torch.equal(step(), before)
    assert written == []
    assert model._lorakit.routes.stacks.of == stacks
    assert {layer: s.A.data_ptr() for layer, s in stacks.items()} == addresses


def test_an_adapter_that_comes_back_under_its_name_with_other_factors(written):
    model, x = build("abc")
    check(model, x, ["a", "b", "c"])
    lk.detach(model, "b")
    attach(model, "b", rank=3)
    written.clear()
    check(model, x, ["a", "b", "c"])
    assert "b" in written


def test_a_layer_that_an_adapter_joins_later_is_routed_too():
    model = tiny.mlp().double().eval()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name="a", trainable=False)
    x = torch.randn(2, 10, dtype=torch.float64)
    with torch.no_grad(), lk.route(model, ["a", None]):
        model(x)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0", "lin1"]), name="b", trainable=False)
    tiny.randomise_factors(model)
    for gone in (None, "b"):
        if gone:
            lk.detach(model, gone)
        choices = [name for name in ("a", "b") if name != gone]
        expected = []
        with torch.no_grad():
            for n, choice in enumerate(choices):
                lk.activate(model, choice)
                expected.append(model(x[n]))
            with lk.route(model, choices):
                torch.testing.assert_close(model(x[: len(choices)]), torch.stack(expected))
    assert len(model._lorakit.routes.names) == 1


@pytest.mark.parametrize("everything", [False, True])
def test_factors_of_a_detached_adapter_are_collected(everything):
    model, x = build("abc")
    for choices in (["a", "b", "c"], ["a", "b", {"a": 0.5, "c": 0.5}], ["a", "a", "b"], ["b", "c", "b"]):
        check(model, x, choices)
        check(model, x.repeat(1, 30, 1), choices)
    gone = [weakref.ref(t) for t in (model[0].lora_a, model[0].lora_a.A, model[0].lora_a.B)]
    with torch.no_grad(), lk.route(model, ["a", "b"]):
        model(x[:2])
    lk.activate(model, "b")
    lk.detach(model, None if everything else "a")
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    if not everything:
        assert inside(model) == {"b", "c"}
        assert all("lora_a" not in routing.children for routing in model._lorakit.routes.last.values())


def test_a_layer_and_its_stack_go_with_its_last_adapter():
    model = tiny.mlp().eval()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name="a", trainable=False)
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0", "lin1"]), name="b", trainable=False)
    with torch.no_grad(), lk.route(model, ["a", "b"]):
        model(torch.randn(2, 10))
    kept, freed = (
        weakref.ref(model._lorakit.routes.stacks.of[model.lin0]),
        weakref.ref(model._lorakit.routes.stacks.of[model.lin1]),
    )
    lk.detach(model, "b")
    gc.collect()
    assert freed() is None
    assert kept() is not None


def test_a_stack_that_is_mostly_room_for_detached_adapters_is_given_up():
    model, x = build("abcde")  # 9 ranks; room for 13
    check(model, x, list("abcde"))
    first = stack(model)
    for name, same in (("c", True), ("b", True), ("d", False)):  # 3, 5, 7 ranks gone
        lk.detach(model, name)
        assert (model._lorakit.routes.stacks.of.get(model[0]) is first) == same
    check(model, x, ["a", "e"])
    assert stack(model).layout.capacity == 3


# The bound


def small(monkeypatch, ranks: int) -> None:
    """A bound of so many ranks for the linear 8 -> 6 in float64."""
    monkeypatch.setattr(stacks_module, "STACK_BYTES", ranks * (8 + 6) * 8)


def test_the_least_recently_used_goes_first(monkeypatch, written):
    small(monkeypatch, 6)
    model, x = build()
    check(model, x, ["a", "b"])  # 1 + 2 ranks
    check(model, x, ["c"])  # + 3: full
    check(model, x, ["a"])
    assert inside(model) == {"a", "b", "c"}
    check(model, x, ["d"])  # 2 ranks: b's, the oldest
    assert inside(model) == {"a", "c", "d"}
    check(model, x, ["e"])  # 1 rank: c is the oldest now
    assert inside(model) == {"a", "d", "e"}
    written.clear()
    check(model, x, ["a", "d", "e"])
    assert written == []
    assert stack(model).A.shape[0] == 6


def test_what_a_batch_names_is_never_evicted_and_the_bound_gives_way_to_what_it_needs(monkeypatch):
    small(monkeypatch, 3)
    model, x = build()
    check(model, x, ["a", "b", "c"])  # 6 ranks: twice that, less than 1.5 x 9 attached
    assert stack(model).layout.capacity == 12
    check(model, x, ["a"])
    check(model, x, list("abcde"))
    assert inside(model) == set("abcde")


@pytest.mark.parametrize("ranks", [3, 5, 6, 8, 100])
def test_any_order_of_mixes_stays_right_and_within_the_bound(monkeypatch, ranks):
    small(monkeypatch, ranks)
    model, x = build()
    made = torch.Generator().manual_seed(ranks)
    for _ in range(40):
        count = int(torch.randint(1, 4, (), generator=made))
        choices = ["abcde"[int(k)] for k in torch.randint(0, 5, (count,), generator=made)]
        check(model, x, choices)
        spans = sorted(stack(model).layout.spans.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert set(stack(model).snapshots) == set(stack(model).layout.spans)
        assert spans[-1][1] <= stack(model).layout.capacity
        assert stack(model).layout.capacity <= max(ranks, 2 * 3 * 3)


def test_a_stack_grows_with_what_is_attached(monkeypatch):
    model, x = build("ab")
    check(model, x, ["a", "b"])
    assert stack(model).layout.capacity == 4
    attach(model, "e")
    check(model, x, ["e", "a"])  # the spare rank
    assert inside(model) == set("abe")
    attach(model, "c")
    attach(model, "d")
    check(model, x, ["c"])
    assert stack(model).layout.capacity == 13
    check(model, x, list("abcde"))
    assert inside(model) == set("abcde")


def test_a_gap_is_the_first_that_is_wide_enough():
    layout = Layout(12, {"a": (0, 2), "b": (3, 5), "c": (8, 9)})
    assert [layout.gap(rank) for rank in (1, 2, 3, 4)] == [2, 5, 5, None]


def test_layers_with_the_same_adapters_share_their_layout():
    model = tiny.llama().eval()
    for name in "abc":
        lk.attach(model, lk.LoraConfig(rank=RANKS[name], targets="all-linear"), name=name, trainable=False)
    for choices in (["a", "b"], ["c", "b"]):
        with torch.no_grad(), lk.route(model, choices):
            tiny.logits(model)
    assert len({id(s.layout) for s in model._lorakit.routes.stacks.of.values()}) == 1
