"""Each kind of adapter in a batch of many gives what it gives alone, and what cannot be served is refused by name."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import made_experts
import pytest
import tiny
import torch
from made_adapters import hadamard, kronecker
from tier_sources import IDS, Given, alone, made, passes, routed, until_ready
from transformers.modeling_outputs import CausalLMOutput

import lorakit as lk
from lorakit.adapter.biased import Biased
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.tokens import Tokens
from lorakit.errors import AdapterError
from lorakit.serve.embedded.calls import Calls
from lorakit.serve.embedded.served import in_precision
from lorakit.serve.embedded.tiers import Tiers


def tied():
    return tiny.llama(tied=True)


EVERY = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
KINDS = {
    "LoRA": (tiny.llama, {}),
    "LoRA on all linears": (tiny.llama, {"targets": EVERY, "rank": 3, "rslora": True}),
    "LoRA of an embedding": (tiny.llama, {"targets": ["embed_tokens", "q_proj"]}),
    "LoRA of a Conv1D": (tiny.gpt2, {"targets": ["c_attn", "c_proj"]}),
    "packed LoRA": (tiny.gpt2, {"packed": {"c_attn": [True, False, True]}, "targets": ["c_attn"]}),
    "DoRA": (tiny.llama, {"variant": "dora", "targets": EVERY}),
    "DoRA of a Conv1D": (tiny.gpt2, {"variant": "dora", "targets": ["c_attn", "c_fc"]}),
    "AdaLoRA": (tiny.llama, {"variant": "adalora"}),
    "LoHa": (tiny.llama, {"variant": "loha"}),
    "LoKr": (tiny.llama, {"variant": "lokr"}),
    "VeRA": (tiny.llama, {"variant": "vera", "alpha": 32.0}),
    "(IA)³": (tiny.llama, {"variant": "ia3", "rank": 16, "alpha": 32.0, "targets": ["k_proj", "v_proj", "down_proj"]}),
    "bottlenecks": (tiny.llama, {"variant": "bottleneck", "targets": ["o_proj", "down_proj"], "alpha": 32.0}),
    "trained biases": (tiny.gpt2, {"targets": ["c_attn"], "bias": "all"}),
    "norms": (tiny.llama, {"save_modules": ["norm", "input_layernorm"]}),
    "a head": (tiny.llama, {"save_modules": ["lm_head"]}),
    "a tied embedding": (tied, {"save_modules": ["embed_tokens"]}),
    "trained tokens": (tiny.llama, {"trainable_tokens": [3, 14, 46]}),
    "trained tokens, tied": (tied, {"trainable_tokens": [3, 14, 46]}),
    "experts": (made_experts.moe, {"targets": ["down_proj", "gate_up_proj", "q_proj"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_equal_each_adapter_alone_also_after_it_was_away(kind):
    make, settings = KINDS[kind]
    adapters = {key: made(make, seed, **settings) for seed, key in enumerate("ab")}
    rank = lk.LoraConfig(rank=3, targets=["c_attn"] if make is tiny.gpt2 else ["q_proj"])
    plain = lk.capture(tiny.randomise_factors(lk.attach(make(), rank), 9))
    model = make()
    tiers = Tiers(model, device=3)

    async def go():
        for key, adapter in {**adapters, "plain": plain}.items():
            await passes(tiers, tiers.load(key, Given(adapter)))

    asyncio.run(go())
    rows = ["a", None, "b", "plain"]
    expected = [alone(make, {**adapters, "plain": plain}.get(key), row) for row, key in enumerate(rows)]
    for _ in range(2):
        found = routed(model, rows)
        for row in range(4):
            torch.testing.assert_close(found[row], expected[row], atol=2e-5, rtol=1e-4)
        for key in "ab":  # away and back, from memory
            entry = tiers._shelves.device[key]
            tiers._shelves.detach(entry)
            tiers._shelves.attach(entry)
    assert not torch.allclose(expected[0], alone(make, None, 0), atol=1e-3)
    tiers.close()
    assert tiny.same_bits(tiny.bits(model), tiny.bits(make()))


def test_factors_are_kept_in_the_precision_of_the_base_and_give_the_same():
    def make():
        return tiny.llama(dtype=torch.bfloat16)

    adapters = {"a": made(tiny.llama, targets=EVERY), "d": made(tiny.llama, 2, variant="dora", targets=EVERY)}
    adapters = {key: replace(adapter, metadata={}) for key, adapter in adapters.items()}
    model = make()
    tiers = Tiers(model, device=2)

    async def go():
        for key, adapter in adapters.items():
            await passes(tiers, tiers.load(key, Given(adapter)))

    asyncio.run(go())
    found = routed(model, ["a", "d"])
    fresh = lk.attach(lk.attach(make(), adapters["a"], "a"), adapters["d"], "d")
    assert torch.equal(found, routed(fresh, ["a", "d"]))
    dtypes = {t.dtype for t in tiers._shelves.device["a"].prepared.tensors}
    assert dtypes == {torch.bfloat16}
    with pytest.raises(AdapterError, match="too large for float16"):
        in_precision(lk.Adapter(adapters["a"].config, {"m": replace(LARGE, alpha=2.0)}), torch.float16)


Q = "model.layers.0.self_attn.q_proj"


def test_a_dora_over_another_kind_is_served():
    inner, size = {"LoHa": hadamard(), "LoKr": kronecker()}, (20, 18)

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.linear = torch.nn.Embedding(48, size[1]), torch.nn.Linear(size[1], size[0])

        def forward(self, input_ids):
            return CausalLMOutput(logits=self.linear(self.embed(input_ids)))

    config = lk.LoraConfig(rank=2, targets=["linear"], variant="dora")
    adapters = {
        key: lk.Adapter(config, {"linear": Dora(update, torch.rand(20, 1, generator=torch.manual_seed(2)))})
        for key, update in inner.items()
    }
    model = Square()
    tiers = Tiers(model, device=2)

    async def go():
        for key, adapter in adapters.items():
            await passes(tiers, tiers.load(key, Given(adapter)))

    asyncio.run(go())
    found = routed(model, ["LoHa", None, "LoKr"])
    for row, key in ((0, "LoHa"), (1, None), (2, "LoKr")):
        torch.testing.assert_close(found[row], alone(Square, adapters.get(key), row), atol=1e-5, rtol=1e-5)


def test_a_packed_one_whose_projection_was_unpacked_meanwhile_is_built_again():
    packed = made(tiny.gpt2, packed={"c_attn": [True, False, True]}, targets=["c_attn"])
    plain = made(tiny.gpt2, 2, targets=["c_attn"])
    model = tiny.gpt2()
    tiers, sources = Tiers(model, device=1), {"packed": Given(packed), "plain": Given(plain)}

    async def go():
        for key, source in sources.items():
            await passes(tiers, tiers.load(key, source))
        for key in ("plain", "packed") * 2:
            await until_ready(tiers, [key])
            torch.testing.assert_close(
                routed(model, [key])[0], alone(tiny.gpt2, sources[key].adapter, 0), atol=1e-5, rtol=1e-5
            )

    asyncio.run(go())


LARGE = lk.Factors(torch.full((2, 16), 1e6), torch.zeros(16, 2), 2.0)


async def _refused(tiers: Tiers, adapter: lk.Adapter) -> str:
    with pytest.raises(AdapterError) as refused:
        await passes(tiers, tiers.load("a", Given(adapter, "legal")))
    assert str(refused.value).startswith("adapter 'legal' cannot be served: ")
    assert tiers.stats().on_device == tiers.stats().in_memory == 0
    return str(refused.value)


def _changed(adapter: lk.Adapter, module: str, **tensors) -> lk.Adapter:
    return replace(adapter, updates={**adapter.updates, module: replace(adapter.updates[module], **tensors)})


def refusals():
    lora, virtual = made(tiny.llama), {"virtual_tokens": 3, "rank": 16, "targets": "all-linear"}
    embeddings = "model.embed_tokens.weight"
    more = torch.zeros(tiny.VOCAB + 4, 16)
    return {
        "virtual tokens (prefix tuning)": made(tiny.llama, variant="prefix", **virtual),
        "virtual tokens (prompt tuning)": made(tiny.llama, variant="prompt", **virtual),
        "trained for the task SEQ_CLS": replace(lora, config=lora.config.replace(task="SEQ_CLS")),
        "textual-inversion embeddings": replace(lora, embeddings={"sks": torch.zeros(1, 16)}),
        "it adds tokens: its 'model.embed_tokens.weight' has 52 rows, the base's 48": replace(
            lora, saved={embeddings: more}
        ),
        "it adds tokens: it trained the id 50": replace(
            lora, updates={"model.embed_tokens": Tokens((3, 50), torch.zeros(2, 16))}
        ),
        "it adds tokens: it trained the id 47, and the base's tokenizer has 40": replace(
            lora, updates={"model.embed_tokens": Tokens((3, 47), torch.zeros(2, 16))}
        ),
        "not finite": _changed(lora, Q, A=torch.full((2, 16), float("nan"))),
        "values that are not finite (NaN": replace(lora, saved={"model.norm.weight": torch.full((16,), float("inf"))}),
        "did you mean 'model.layers.0.self_attn.q_proj'": replace(lora, updates={f"{Q}o": lora.updates[Q]}),
        "do not fit 'model.layers.0.self_attn.q_proj'": _changed(lora, Q, A=torch.zeros(2, 17)),
        "trained on another base": made(tied),
        "update of kind 'dense', which cannot be attached": replace(lora, updates={Q: Dense(torch.zeros(16, 16))}),
        "update of kind 'biased', which cannot be attached": replace(
            lora, updates={Q: Biased(lora.factors[Q], torch.zeros(16))}
        ),
        "is empty": lk.Adapter(lora.config, {}),
    }


def test_what_cannot_be_served_is_refused_by_name_and_changes_nothing():
    model = tiny.llama()
    tiers = Tiers(model, range(40), device=2)
    bits = tiny.bits(model)

    async def go():
        for expected, adapter in refusals().items():
            assert expected in await _refused(tiers, adapter)
        await passes(tiers, tiers.load("a", Given(made(tiny.llama))))

    asyncio.run(go())
    assert tiers.ready("a")
    tiers.close()
    assert tiny.same_bits(tiny.bits(model), bits)


def test_an_error_of_the_source_is_the_adapters_by_name():
    tiers = Tiers(tiny.llama(), device=2)
    source = Given(made(tiny.llama), "legal")
    source.error = OSError(5, "Input/output error")

    async def go():
        with pytest.raises(AdapterError, match=r"adapter 'legal' cannot be served: OSError: .*Input/output error"):
            await passes(tiers, tiers.load("a", source))

    asyncio.run(go())


class Pooled(torch.nn.Module):
    """A model one of whose modules is called once for all rows, one with some tokens, and one of which gives a pair."""

    def __init__(self):
        super().__init__()
        self.embed, self.rows = torch.nn.Embedding(48, 8), torch.nn.Linear(8, 8)
        self.flat, self.some, self.shared = (torch.nn.Linear(8, 8) for _ in range(3))
        self.pair = torch.nn.LSTM(8, 8, batch_first=True)
        self.never = torch.nn.Linear(8, 8)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.rows(self.embed(input_ids))
        x = self.flat(x.flatten(0, 1)).view_as(x) + self.shared(torch.zeros(1, 8))
        y = self.some(x.flatten(0, 1)[:4]).sum()
        return self.pair(x)[0] + y


def test_nothing_is_served_on_a_base_that_has_an_adapter_merged_into_it():
    model = lk.attach(tiny.llama(), made(tiny.llama, 3), "style")
    lk.merge(model)
    tiers = Tiers(model, device=2)
    refused = asyncio.run(_refused(tiers, made(tiny.llama)))
    assert "while 'style' is merged\n  call lorakit.unmerge(model) first" in refused


def test_how_a_model_calls_its_modules_is_seen():
    model = Pooled()
    calls = Calls(model)
    modules = dict(model.named_children())
    fine = {name for name, module in modules.items() if calls.why_not_adapted(module) is None}
    assert fine == {"embed", "rows", "flat", "pair", "never"}
    assert "more than one tensor" in str(calls.why_not_saved(model.pair))
    assert calls.why_not_saved(model.rows) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_whose_rows_cannot_be_told_apart_is_refused():
    adapter = made(tiny.llama)
    model = tiny.llama()
    tiers = Tiers(model, device=2)
    tiers._loader._calls._rows[model.get_submodule(Q)] = False

    async def go():
        return await _refused(tiers, adapter)

    assert f"it changes '{Q}', whose rows cannot have adapters of their own" in asyncio.run(go())


def test_one_with_whole_weights_comes_while_another_such_is_in_use():
    """Inside a forward the base's parameters are swapped for theirs, so the engine's thread builds it."""
    adapters = {key: made(tiny.llama, seed, save_modules=["lm_head", "norm"]) for seed, key in enumerate("ab")}
    model = tiny.llama()
    tiers = Tiers(model, device=2)

    async def go():
        for key, adapter in adapters.items():
            await passes(tiers, tiers.load(key, Given(adapter)))
            assert tiers._loader.swapping

    asyncio.run(go())
    found = routed(model, ["a", "b"])
    for row, key in enumerate("ab"):
        torch.testing.assert_close(found[row], alone(tiny.llama, adapters[key], row), atol=1e-5, rtol=1e-5)
    assert IDS.shape == (4, 4)
