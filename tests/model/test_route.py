"""`route`: one choice per row. What it refuses, what it leaves behind,
and that mixed generation is each adapter's own.
"""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import StateError


def mixed(make=tiny.llama, **config) -> nn.Module:
    """A model with adapters a, b, c of unequal ranks; c is active."""
    model = make()
    for rank, name in ((2, "a"), (3, "b"), (2, "c")):
        lk.attach(model, lk.LoraConfig(**{"rank": rank, "targets": "all-linear"} | config), name=name, trainable=False)
    return tiny.randomise_factors(model, size=0.5)


@pytest.fixture
def model():
    return mixed()


def ids(rows: int, length: int = 7) -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def test_logits_of_each_row_are_its_adapters(model):
    choices = ["b", None, {"a": 0.7, "c": 0.3}, "a", "b"]
    expected = []
    with torch.no_grad():
        for n, choice in enumerate(choices):
            lk.activate(model, choice)
            expected.append(model(ids(5)).logits[n])
        with lk.route(model, choices):
            torch.testing.assert_close(model(ids(5)).logits, torch.stack(expected))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_logits_without_gradients_are_the_same_in_training_mode(make):
    model = mixed(make)
    for rank, name in ((2, "x"), (2, "y")):  # of equal ranks: computed as groups of rows
        lk.attach(model, lk.LoraConfig(rank=rank), name=name, trainable=False)
    tiny.randomise_factors(model, size=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for choices in (["x", "y"], ["a", "b"], ["x", "x"]):
        with torch.no_grad(), lk.route(model, choices):
            torch.testing.assert_close(model.train()(ids(2)).logits, model.eval()(ids(2)).logits)


# Generation


def together_and_alone(
    model: nn.Module, inputs: dict, choices: list, each: int = 1, repeat: int = 1, **settings
) -> None:
    """What each row generates among the others is what it generates when its adapter is active for all of them."""
    pad = 0

    def generate(*, routed: bool) -> torch.Tensor:
        torch.manual_seed(11)
        if not routed:
            return model.generate(**inputs, max_new_tokens=10, pad_token_id=pad, **settings)
        with lk.route(model, choices, repeat=repeat):
            return model.generate(**inputs, max_new_tokens=10, pad_token_id=pad, **settings)

    def trimmed(row: torch.Tensor) -> list[int]:
        found = row.tolist()
        while found and found[-1] == pad:
            found.pop()
        return found

    ours = generate(routed=True)
    seen = set()
    for n, choice in enumerate(choices):
        lk.activate(model, choice)
        alone = generate(routed=False)
        for i in range(n * each, (n + 1) * each):
            assert trimmed(ours[i]) == trimmed(alone[i])
            seen.add(tuple(trimmed(ours[i])[-10:]))
    assert len(seen) > 2  # the adapters do differ


CHOICES = ["a", None, {"a": 0.5, "b": 0.5}, "c", "b"]
WAYS = {
    "greedy": ({}, 1, 1),
    "without a cache": ({"use_cache": False}, 1, 1),
    "sampling": ({"do_sample": True, "temperature": 1.5}, 1, 1),
    "two samples each": ({"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}, 2, 2),
    "beams": ({"num_beams": 3}, 1, 3),
    "beams, all returned": ({"num_beams": 3, "num_return_sequences": 3}, 3, 3),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, 1, 2),
}


@pytest.mark.parametrize("prompts", ["equal", "unequal"])
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_token_for_token_each_adapters_own(model, way, prompts):
    settings, each, repeat = WAYS[way]
    inputs = {"input_ids": ids(5), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    if prompts == "unequal":  # padded on the left
        for n, missing in enumerate((0, 2, 4, 1, 3)):
            inputs["attention_mask"][n, :missing] = 0
            inputs["input_ids"][n, :missing] = 0
    together_and_alone(model, inputs, CHOICES, each, repeat, **settings)


@pytest.mark.parametrize("settings, repeat", [({}, 1), ({"num_beams": 2}, 2)], ids=["greedy", "beams"])
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.t5], ids=["gpt2", "t5"])
def test_generation_of_other_architectures(make, settings, repeat):
    model = mixed(make, targets=["c_attn", "c_fc"]) if make is tiny.gpt2 else mixed(make)
    inputs = {"input_ids": ids(4), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    together_and_alone(model, inputs, ["a", None, "c", "b"], 1, repeat, **settings)


def test_a_server_that_enters_at_every_step(model):
    prompt = ids(3)
    expected = []
    with torch.inference_mode():
        for n, name in enumerate(("a", "b", "c")):
            lk.activate(model, name)
            expected.append(
                model.generate(prompt[n : n + 1], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[
                    0, 7:
                ]
            )
        with lk.route(model, ["a", "b", "c"]):
            out = model(prompt, use_cache=True)
        found = [out.logits[:, -1].argmax(-1)]
        for _ in range(3):
            with lk.route(model, ["a", "b", "c"]):
                out = model(found[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1].argmax(-1))
        assert torch.equal(torch.stack(found, 1), torch.stack(expected))
        assert len(model._lorakit.routes.last) == 1  # the same batch is derived once


# What it refuses


@pytest.mark.parametrize(
    "choices, message",
    [
        (["a", "bb"], "no adapter named 'bb' is attached"),
        ([{"a": 0.5, "zz": 1}], "no adapter named 'zz'"),
        ([{"a": float("nan")}], "weight of adapter 'a' \\(row 0\\) is nan"),
        ([{"a": "0.5"}], "weight of adapter 'a'"),
        ([{"a": True}], "weight of adapter 'a'"),
        (["a", 3], "row 1 of route's choices is 3"),
        ("a", "expected a list"),
        ({"a": 1.0}, "expected a list"),
        (None, "expected a list"),
    ],
)
def test_choices_that_say_nothing_sensible_are_errors(model, choices, message):
    with pytest.raises(StateError, match=message), lk.route(model, choices):
        pytest.fail("entered")
    assert model._lorakit.routing is None


def test_a_nearby_name_is_suggested(model):
    lk.attach(model, lk.LoraConfig(rank=1), name="style")
    with pytest.raises(StateError, match="did you mean 'style'"), lk.route(model, ["stile"]):
        pass


@pytest.mark.parametrize("repeat", [0, -1, 1.5, "2"])
def test_a_repeat_that_is_no_number_of_rows_is_an_error(model, repeat):
    with pytest.raises(StateError, match="repeat"), lk.route(model, ["a"], repeat=repeat):
        pass


def test_another_number_of_rows_is_an_error_that_names_the_module_and_both_numbers(model):
    with (
        pytest.raises(StateError, match=r"'model.layers.0.self_attn.q_proj' was given 3 rows .* expected 2"),
        lk.route(model, ["a", None]),
    ):
        model(ids(3))
    with pytest.raises(StateError, match="first axis"), lk.route(model, ["a", None, "b"]):
        model(ids(2))


def test_rows_that_come_several_times_get_a_hint_at_repeat(model):
    with pytest.raises(StateError, match="repeat=3"), lk.route(model, ["a", None]):
        model.generate(ids(2), num_beams=3, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(StateError, match="expected 2 x repeat=2"), lk.route(model, ["a", None], repeat=2):
        model(ids(3))


@pytest.mark.parametrize("make, targets", [(tiny.cnn, ["conv1"]), (tiny.embedder, ["emb"])])
def test_every_kind_of_layer_counts_its_rows(make, targets):
    model = lk.attach(make(), lk.LoraConfig(rank=2, targets=targets), name="a")
    with pytest.raises(StateError, match=f"'{targets[0]}' was given 2 rows"), lk.route(model, ["a", "a", "a"]):
        model(*tiny.example(model).values())


def test_flattened_tokens_are_an_error():
    model = lk.attach(tiny.mlp(), lk.LoraConfig(rank=2, targets=["lin0"]), name="a")
    with pytest.raises(StateError, match="was given 6 rows"), lk.route(model, ["a", None]):
        model(torch.randn(6, 10))


def test_a_model_without_adapters_is_an_error():
    with pytest.raises(StateError, match="no adapter is attached"), lk.route(tiny.mlp(), ["a"]):
        pass


def test_merged_is_an_error(model):
    lk.merge(model)
    with pytest.raises(StateError, match=r"'c' is merged.*\n.*unmerge"), lk.route(model, ["a"]):
        pass
    lk.unmerge(model)
    with lk.route(model, ["a"]):
        pass


def test_an_adapter_with_whole_weights_cannot_be_scaled_in_a_row():
    model = tiny.bert()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["query"], save_modules=["classifier"]), name="whole")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["query"]), name="plain")
    with (
        pytest.raises(StateError, match=r"adapter 'whole' \(row 1\) replaces weights of the base \(classifier"),
        lk.route(model, ["plain", {"whole": 0.5}]),
    ):
        pass


def test_inside_whole_weights_of_the_active_adapter_are_the_bases():
    model = tiny.bert()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["query"]), name="plain")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["query"], save_modules=["classifier"]), name="whole")
    tiny.randomise_factors(model)
    whole = tiny.logits(model)
    lk.activate(model, "plain")
    plain = tiny.logits(model)
    lk.activate(model, "whole")
    with lk.route(model, ["plain", "plain"]):
        torch.testing.assert_close(tiny.logits(model), plain)
    assert torch.equal(tiny.logits(model), whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: lk.attach(m, lk.LoraConfig(rank=2), name="new"),
        lambda m: lk.activate(m, "a"),
        lambda m: lk.merge(m),
        lambda m: lk.detach(m, "a"),
        lambda m: lk.detach(m),
        lambda m: lk.route(m, ["b"]).__enter__(),
    ],
    ids=["attach", "activate", "merge", "detach one", "detach", "route"],
)
def test_what_would_change_the_model_inside_is_an_error_and_changes_nothing(model, change):
    before = tiny.logits(model)
    with lk.route(model, ["a", "b"]):
        routed = tiny.logits(model)
        with pytest.raises(StateError, match=r"inside .with lorakit\.route"):
            change(model)
        assert torch.equal(tiny.logits(model), routed)
    assert torch.equal(tiny.logits(model), before)


# What it leaves behind


@pytest.mark.parametrize("active", ["a", None, {"a": 0.5, "b": 2.0}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_as_before_also_after_an_exception(model, active, fails):
    lk.activate(model, active)
    before, logits, now = tiny.picture(model), tiny.logits(model), lk.active(model)
    with pytest.raises(StateError) if fails else contextlib.nullcontext(), lk.route(model, ["b", None]):
        tiny.logits(model)
        if fails:
            model(ids(3))
    assert lk.active(model) == now
    assert torch.equal(tiny.logits(model), logits)
    assert tiny.picture(model) == before


def test_afterwards_detach_leaves_no_trace():
    fresh = tiny.llama()
    before, bits = tiny.picture(fresh), tiny.bits(fresh)
    for name in "ab":
        lk.attach(fresh, lk.LoraConfig(rank=2), name=name, trainable=False)
    with lk.route(fresh, ["a", "b"]):
        tiny.logits(fresh)
    lk.detach(fresh)
    assert tiny.picture(fresh) == before
    assert tiny.same_bits(tiny.bits(fresh), bits)


def test_an_adapter_that_is_gone_is_not_kept_for_later(model):
    with lk.route(model, ["a", "b"]):
        tiny.logits(model)
    lk.detach(model, "a")
    with pytest.raises(StateError, match="no adapter named 'a'"), lk.route(model, ["a", "b"]):
        pass
    lk.attach(model, lk.LoraConfig(rank=4), name="a", trainable=False)
    tiny.randomise_factors(model, seed=9)
    lk.activate(model, "a")
    expected = tiny.logits(model)
    with lk.route(model, ["a", "b"]):
        torch.testing.assert_close(tiny.logits(model)[0], expected[0])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_made_inside_is_not_inside(model, way):
    outside = tiny.logits(model)
    with lk.route(model, ["a", "b"]):
        routed = tiny.logits(model)
        twin = way(model)
        assert torch.equal(tiny.logits(twin), outside)
        with lk.route(twin, ["a", "b"]):
            assert torch.equal(tiny.logits(twin), routed)


def test_training_several_adapters_on_one_batch_is_training_each_alone():
    """SGD on three rows with an adapter each, against three models with one adapter and one row."""
    rows, names = ids(3), ["a", "b", "c"]
    joint = tiny.llama()
    alone = {}
    for rank, name in enumerate(names, start=2):
        lk.attach(joint, lk.LoraConfig(rank=rank), name=name, trainable=True)
        alone[name] = lk.attach(tiny.llama(), lk.capture(joint, name), trainable=True)
    steps = {name: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for name, m in alone.items()}
    together = torch.optim.SGD([p for p in joint.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        with lk.route(joint, names):
            (3 * joint(rows, labels=rows).loss).backward()
        together.step()
        together.zero_grad()
        for n, (name, model) in enumerate(alone.items()):
            model(rows[n : n + 1], labels=rows[n : n + 1]).loss.backward()
            steps[name].step()
            steps[name].zero_grad()
    for name, model in alone.items():
        ours, theirs = lk.capture(joint, name), lk.capture(model)
        for m in theirs.factors:
            torch.testing.assert_close(ours.factors[m].B, theirs.factors[m].B, atol=1e-5, rtol=1e-4)
            assert theirs.factors[m].B.abs().max() > 0


# Packed batches: one choice per token


def packing(lengths: list[int]) -> tuple[dict, list[slice]]:
    """Rows of these lengths behind each other, [1, tokens], that do not see each other; and where each is."""
    rows = [ids(len(lengths), length)[n : n + 1] for n, length in enumerate(lengths)]
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = {"input_ids": torch.cat(rows, 1), "position_ids": positions, "use_cache": False}
    return inputs, [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("choices", [["a", None, {"a": 0.7, "c": 0.3}, "b"], ["b", "a", "b", "c"]], ids=str)
@pytest.mark.parametrize("lengths", [[5, 1, 4, 7], [3, 3, 3, 3], [80, 70, 66, 90]], ids=str)
def test_packed_rows_have_their_adapters_values_and_gradients(choices, lengths):
    model = tiny.llama().eval()
    for rank, name in ((2, "a"), (3, "b"), (2, "c")):
        lk.attach(model, lk.LoraConfig(rank=rank, targets="all-linear"), name=name, trainable=True)
    tiny.randomise_factors(model, size=0.5)
    inputs, places = packing(lengths)
    wanted = [p for p in model.parameters() if p.requires_grad]
    alone = []
    for place, choice in zip(places, choices, strict=True):
        lk.activate(model, choice)
        alone.append(model(**{k: v[:, place] if torch.is_tensor(v) else v for k, v in inputs.items()}).logits)
    expected = torch.cat(alone, 1)
    theirs = torch.autograd.grad(expected.square().mean(), wanted, materialize_grads=True)
    per_token = [choice for choice, length in zip(choices, lengths, strict=True) for _ in range(length)]
    with lk.route(model, per_token, per="token"):
        logits = model(**inputs).logits
        ours = torch.autograd.grad(logits.square().mean(), wanted, materialize_grads=True)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-3)


def test_rows_and_tokens_of_equal_choices_are_not_taken_for_each_other():
    """What is derived once from a batch and found again knows what its choices are for."""
    model = tiny.mlp().eval()
    for name in "ab":
        lk.attach(model, lk.LoraConfig(rank=2, targets=["lin0"]), name=name, trainable=False)
    tiny.randomise_factors(model)
    x = torch.randn(1, 2, 10)
    with torch.no_grad():
        for _ in range(2):
            with lk.route(model, ["a", "b"]):
                rows = model(x[0])
                with pytest.raises(StateError, match="1 rows"):
                    model(x)
            with lk.route(model, ["a", "b"], per="token"):
                torch.testing.assert_close(model(x)[0], rows)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: lk.route(m, ["a"], per="tokens"), "per='tokens'.*expected 'row', or 'token'"),
        (lambda m: lk.route(m, ["a"], 2, per="token"), "repeat=2, per='token'.*\n  give one choice per token"),
        (lambda m: lk.route(m, ["a", "bb"], per="token"), "no adapter named 'bb'"),
        (lambda m: lk.route(m, ["a", 3], per="token"), "token 1 of route's choices is 3"),
        (lambda m: lk.route(m, [{"a": float("inf")}], per="token"), r"adapter 'a' \(token 0\) is inf"),
    ],
)
def test_choices_per_token_that_say_nothing_sensible_are_errors(model, call, message):
    with pytest.raises(StateError, match=message), call(model):
        pytest.fail("entered")
    assert model._lorakit.routing is None


def test_a_module_that_sees_some_of_the_tokens_is_an_error_that_names_it(model):
    message = r"'model.layers.0.self_attn.q_proj' was given 5 tokens .* expected 7"
    with pytest.raises(StateError, match=message), lk.route(model, ["a"] * 7, per="token"):
        model(ids(1, 5))
