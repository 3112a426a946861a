"""Attaching in two steps: what was prepared is attached as by `attach`, also again after it was detached."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from tier_sources import alone, made, routed

import lorakit as lk
from lorakit.errors import AdapterError, StateError
from lorakit.model.prepared import prepare
from lorakit.model.route import expect
from lorakit.model.state import STATE

EVERY = ["q_proj", "o_proj", "gate_proj", "down_proj"]


def test_it_is_attached_as_by_attach_and_what_is_active_stays(tiny_llama):
    first, second = made(tiny.llama, 1, targets=EVERY), made(tiny.llama, 2, targets=EVERY, save_modules=["lm_head"])
    lk.attach(tiny_llama, first, "first")
    expected = tiny.logits(tiny_llama)
    prepared = prepare(tiny_llama, second, "second")
    prepared.attach(tiny_llama)
    assert lk.active(tiny_llama) == {"first": 1.0}
    assert torch.equal(tiny.logits(tiny_llama), expected)
    other = lk.attach(lk.attach(tiny.llama(), first, "first"), second, "second", activate=False)
    assert torch.equal(routed(tiny_llama, ["first", "second", None]), routed(other, ["first", "second", None]))
    assert lk.capture(tiny_llama, "second").digest() == second.digest()
    assert lk.capture(tiny_llama, "second").config == lk.capture(other, "second").config
    held = [t for u in second.updates.values() for t in u.tensors().values()] + list(second.saved.values())
    assert prepared.bytes == sum(t.numel() * t.element_size() for t in held)


def test_it_can_be_attached_again_also_where_it_was_the_only_one(tiny_llama):
    adapter = made(tiny.llama, targets=EVERY, save_modules=["norm"])
    bits = tiny.bits(tiny_llama)
    prepared = prepare(tiny_llama, adapter, "sql")
    for _ in range(2):
        prepared.attach(tiny_llama)
        found = routed(tiny_llama, ["sql", None])
        torch.testing.assert_close(found[0], alone(tiny.llama, adapter, 0), atol=1e-5, rtol=1e-5)
        lk.detach(tiny_llama, "sql")
        assert tiny.same_bits(tiny.bits(tiny_llama), bits)


def test_preparing_beside_others_changes_nothing_and_needs_no_end_of_a_forward(tiny_llama):
    lk.attach(tiny_llama, made(tiny.llama, targets=EVERY), "first")
    bits, expected = tiny.bits(tiny_llama), routed(tiny_llama, ["first", None])
    made_here = []

    def work():
        made_here.extend(prepare(tiny_llama, made(tiny.llama, n, targets=EVERY), f"a{n}") for n in range(5))

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        assert torch.equal(routed(tiny_llama, ["first", None]), expected)
    thread.join()
    assert len(made_here) == 5
    assert tiny.same_bits(tiny.bits(tiny_llama), bits)
    assert lk.adapters(tiny_llama) == ["first"]


def test_what_does_not_fit_is_refused_before_and_leaves_the_model_as_it_is(tiny_llama):
    adapter, bits = made(tiny.llama, targets=EVERY), tiny.bits(tiny_llama)
    with pytest.raises(AdapterError, match="trained on another base"):
        prepare(tiny_llama, made(lambda: tiny.llama(tied=True)), "a")
    prepared = prepare(tiny_llama, adapter, "a")
    wrong = prepare(tiny_llama, made(tiny.llama, 2, targets=EVERY), "wrong")
    wrong.plan.values["model.layers.1.mlp.down_proj"].B.resize_(3, 2)
    with pytest.raises(AdapterError, match="do not fit"):
        wrong.attach(tiny_llama)
    assert STATE not in tiny_llama.__dict__
    assert tiny.same_bits(tiny.bits(tiny_llama), bits)
    prepared.attach(tiny_llama)
    with pytest.raises(StateError, match="'a' is attached already"):
        prepared.attach(tiny_llama)
    other = prepare(tiny_llama, adapter, "b")
    with lk.route(tiny_llama, ["a"]), pytest.raises(StateError, match="call it outside the `with` block"):
        other.attach(tiny_llama)


def test_room_for_adapters_that_are_to_come_keeps_stacks_as_they_are(tiny_llama):
    first = made(tiny.llama)
    lk.attach(tiny_llama, first, "a0", activate=False)
    expect(tiny_llama, 6)
    found = [routed(tiny_llama, ["a0", None])]
    stacks = dict(tiny_llama.__dict__[STATE].routes.stacks.of)
    buffers = {layer: stack.A.data_ptr() for layer, stack in stacks.items()}
    for n in range(1, 6):
        lk.attach(tiny_llama, made(tiny.llama, n), f"a{n}", activate=False)
        found.append(routed(tiny_llama, [f"a{n}", None]))
    now = tiny_llama.__dict__[STATE].routes.stacks.of
    assert {layer: stack.A.data_ptr() for layer, stack in now.items()} == buffers
    for n in range(1, 6):
        torch.testing.assert_close(found[n][0], alone(tiny.llama, made(tiny.llama, n), 0), atol=1e-5, rtol=1e-5)
