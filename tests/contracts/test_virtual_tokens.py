"""What every kind of virtual tokens promises: it is the model's with PEFT's values, a row is computed alike wherever it
stands, and what cannot be right is refused. A new kind is a line of KINDS.
"""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import tiny
import torch

import lorakit as lk
from lorakit.config.virtual_tokens import VIRTUAL
from lorakit.errors import AdapterError, ConfigError, LorakitError, LorakitWarning, StateError, TargetError
from lorakit.generate.generate import generate, stream
from lorakit.model.detach import detach

N, VOCAB = 5, tiny.VOCAB
# kind -> its encoders, and PEFT's config with the same one
KINDS = {
    "prefix": {
        "none": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
        "mlp": lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=12
        ),
    },
    "prompt": {"none": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)},
    "p_tuning": {
        "mlp": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=12),
        "lstm": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
        ),
    },
}
PAIRS = [(kind, encoder) for kind, encoders in KINDS.items() for encoder in encoders]
ROWS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


def small(name: str):
    """Decoders with more positions than `tiny`'s."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    config = {
        "llama": lambda: LlamaConfig(**sizes),
        "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        "qwen2, grouped queries": lambda: Qwen2Config(**sizes, num_key_value_heads=2),
        "mistral, sliding windows": lambda: MistralConfig(**sizes, num_key_value_heads=2, sliding_window=6),
    }[name]()
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def config(kind: str, encoder: str, **settings) -> lk.LoraConfig:
    size = {} if encoder == "none" else {"encoder_size": 12}
    return lk.LoraConfig(variant=kind, virtual_tokens=N, prompt_encoder=encoder, **size, **settings)


def attached(kind: str, encoder: str, base: str = "llama", seed: int = 3, name: str = "default"):
    torch.manual_seed(seed)
    return lk.attach(small(base), config(kind, encoder), name)


def greedy(model, ids, steps: int):
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1)[:, None]], 1)
    return ids


def padded_left(ids, count: int):
    pads = torch.zeros(len(ids), count, dtype=torch.long)
    return {"input_ids": torch.cat([pads, ids], 1), "attention_mask": torch.cat([pads, torch.ones_like(ids)], 1)}


def test_every_kind_has_its_line_here():
    assert tuple(KINDS) == VIRTUAL


@pytest.mark.parametrize("base", ["llama", "gpt2", "qwen2, grouped queries", "mistral, sliding windows"])
@pytest.mark.parametrize("kind, encoder", PAIRS)
def test_logits_loss_and_gradients_are_pefts(kind, encoder, base):
    model = lk.attach(small(base), config(kind, encoder))
    theirs = peft.get_peft_model(small(base), KINDS[kind][encoder]()).eval()
    values = theirs.prompt_encoder["default"].state_dict()
    update = model.base_model.lora_default
    with torch.no_grad():
        if update.encoder is not None:
            update.encoder.load_state_dict(values)
        else:
            update.embeddings.copy_(values["embedding.weight"])
    labels = ROWS.clone()
    labels[:, :3] = -100
    mine, other = model(input_ids=ROWS, labels=labels), theirs(input_ids=ROWS, labels=labels)
    assert torch.equal(mine.logits, other.logits[:, -ROWS.shape[1] :])
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=0)
    mine.loss.backward()
    other.loss.backward()
    pairs = zip(update.parameters(), theirs.prompt_encoder["default"].parameters(), strict=True)
    assert all(p.grad.any() for p in update.parameters())
    for own, their in pairs:
        torch.testing.assert_close(own.grad, their.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("kind, encoder", PAIRS)
def test_a_row_is_computed_alike_with_padding_on_either_side(kind, encoder, base):
    model = attached(kind, encoder, base)
    alone = model(ROWS).logits
    with torch.no_grad():
        left = model(**padded_left(ROWS, 4)).logits[:, 4:]
        more = torch.cat([ROWS, ROWS[:, :2]], 1)
        mask = torch.ones_like(more)
        mask[:, 9:] = 0
        right = model(input_ids=more, attention_mask=mask).logits[:, :9]
    torch.testing.assert_close(left, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(right, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", ["llama", "gpt2", "mistral, sliding windows"])
@pytest.mark.parametrize("kind, encoder", [("prefix", "none"), ("prompt", "none")])
def test_generate_is_recomputing_each_step(kind, encoder, base):
    model = attached(kind, encoder, base)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        steps = greedy(model, ROWS, 6)
        given = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
        assert torch.equal(model.generate(**given, **options), steps)
        beams = model.generate(**given, **options, num_beams=3)
        assert torch.equal(beams, model.generate(**given, **options, num_beams=3, use_cache=False))
        if base != "mistral, sliding windows":
            assert torch.equal(model.generate(**padded_left(ROWS, 3), **options)[:, 3:], steps)


@pytest.mark.parametrize("kind, encoder", [("prefix", "none"), ("prompt", "none")])
def test_our_own_decoding_gives_the_tokens_of_each_row_alone(kind, encoder):
    model = attached(kind, encoder)

    class Letters:
        pad_token_id, eos_token_id = 0, None

        def decode(self, ids, **_):
            return "".join(chr(60 + i) for i in ids)

    rows = [ROWS[0].tolist(), ROWS[1, :4].tolist(), ROWS[2, :7].tolist()]
    texts = generate(model, Letters(), rows, max_new_tokens=6)
    with torch.no_grad():
        alone = [greedy(model, torch.tensor([row]), 6)[0, len(row) :].tolist() for row in rows]
    assert texts == [Letters().decode(ids) for ids in alone]
    assert "".join(stream(model, Letters(), rows[0], max_new_tokens=6)) == texts[0]


@pytest.mark.parametrize("kind, encoder", PAIRS)
def test_the_base_alone_has_its_bits_and_detach_leaves_nothing(kind, encoder):
    base = small("llama")
    keys, cls, before = set(base.state_dict()), type(base.model), base(ROWS).logits
    model = lk.attach(base, config(kind, encoder))
    assert isinstance(model.model, cls)
    assert not torch.equal(model(ROWS).logits, before)
    lk.activate(model, None)
    assert torch.equal(model(ROWS).logits, before)
    detach(model)
    assert type(model.model) is cls
    assert set(model.state_dict()) == keys
    assert torch.equal(model(ROWS).logits, before)
    assert not [name for name in model.model.__dict__ if name.startswith("lora_")]


@pytest.mark.parametrize("kind, encoder", PAIRS)
def test_captured_attached_copied_and_pickled_it_is_the_same_to_the_bit(kind, encoder):
    model = attached(kind, encoder).requires_grad_(False)
    value = lk.capture(model)
    again, trained = (lk.attach(small("llama"), value, trainable=t) for t in (False, True))
    wanted = again(ROWS).logits
    torch.testing.assert_close(model(ROWS).logits, wanted, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in again.parameters())
    assert any(p.requires_grad for p in trained.parameters())
    assert lk.capture(again).digest() == lk.capture(trained).digest() == value.digest()
    assert torch.equal(copy.deepcopy(again)(ROWS).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(again))(ROWS).logits, wanted)
    assert value.parameters == again.model.lora_default.embeddings.numel()


@pytest.mark.parametrize("kind, encoder", [("prefix", "mlp"), ("prompt", "none")])
def test_hidden_states_tuples_and_caches_are_of_the_rows_own_tokens(kind, encoder):
    model = attached(kind, encoder)
    out = model(ROWS, output_hidden_states=True, use_cache=False)
    assert {h.shape[1] for h in out.hidden_states} == {9}
    assert getattr(out, "past_key_values", None) is None
    logits, *rest = model(ROWS, return_dict=False, use_cache=False)
    assert torch.equal(logits, out.logits)
    assert not rest
    assert torch.equal(model.model(ROWS).last_hidden_state, out.hidden_states[-1])


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_save_pretrained_keeps_it_beside_the_base_that_transformers_loads(kind, tmp_path):
    model = attached(kind, next(iter(KINDS[kind])))
    with pytest.warns(LorakitWarning, match="the base alone"):
        model.save_pretrained(tmp_path)
    base = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(base(ROWS).logits, small("llama")(ROWS).logits)
    again = lk.attach(base, lk.Adapter.load(tmp_path / "default"))
    assert torch.equal(again(ROWS).logits, model(ROWS).logits)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_several_adapters_have_their_own(kind):
    encoder = next(iter(KINDS[kind]))
    model = attached(kind, encoder, name="a")
    torch.manual_seed(9)
    lk.attach(model, config(kind, encoder), "b")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"]), "lora")
    outputs = []
    for which in ("a", "b", "lora", {"a": 1.0, "lora": 0.5}):
        lk.activate(model, which)
        outputs.append(model(ROWS).logits)
    assert not torch.equal(outputs[0], outputs[1])
    with pytest.raises(StateError, match="a row has those of one"):
        lk.activate(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(StateError, match="cannot be scaled"):
        lk.activate(model, {"a": 0.5})
    with pytest.raises(StateError, match="'b', which has virtual tokens"), lk.route(model, ["b", None, "lora"]):
        pass
    with lk.route(model, ["lora", None, "lora"]):
        model(ROWS)
    lk.activate(model, "a")
    with pytest.raises(StateError, match="change no weight"):
        lk.merge(model)
    assert torch.equal(model(ROWS).logits, outputs[0])


@pytest.mark.parametrize("kind", VIRTUAL)
def test_calls_that_cannot_be_right_are_refused(kind):
    from transformers import DynamicCache

    model = attached(kind, next(iter(KINDS[kind])))
    with pytest.raises(StateError, match="fixed number of positions"):
        model.generate(ROWS, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    with pytest.raises(StateError, match="packed rows"):
        model(ROWS, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False)
    with pytest.raises(StateError, match=r"attention_mask is \[3, 14\]"):
        model(ROWS, attention_mask=torch.ones(3, 14))
    lk.activate(model, None)
    cache = DynamicCache(config=model.config)
    model(ROWS, cache=cache, use_cache=True) if "cache" in _names(model) else model(ROWS, past_key_values=cache)
    lk.activate(model, "default")
    with pytest.raises(StateError, match="filled without"):
        model(ROWS[:, :1], **{_names(model)[0]: cache})
    with pytest.raises(StateError, match="input_ids"):
        model.model()
    out = model(ROWS, use_cache=True)
    lk.activate(model, None)
    with pytest.raises(StateError, match="filled with virtual tokens"):
        model(ROWS[:, :1], **{_names(model)[0]: out[_names(model)[0]]})


def _names(model) -> list[str]:
    import inspect

    return [n for n in ("cache", "past_key_values") if n in inspect.signature(type(model).forward).parameters]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_classifier_reads_each_rows_own_last_token(kind):
    from transformers import LlamaForSequenceClassification

    base = small("llama").config
    base.num_labels = 3
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(base).eval()
    lk.attach(model, config(kind, next(iter(KINDS[kind])), task="SEQ_CLS"))
    hidden = model.model(ROWS).last_hidden_state
    torch.testing.assert_close(model(ROWS).logits, model.score(hidden[:, -1]), atol=1e-6, rtol=0)
    right = torch.cat([ROWS, torch.zeros(3, 2, dtype=torch.long)], 1)
    padded = model(right, attention_mask=(right != 0).long()).logits
    torch.testing.assert_close(padded, model(ROWS).logits, atol=1e-6, rtol=0)


def test_padding_before_a_sliding_window_is_refused():
    model = attached("prefix", "none", "mistral, sliding windows")
    with pytest.raises(StateError, match=r"sliding_window"):
        model(**padded_left(ROWS, 4))
    with pytest.raises(StateError, match=r"sliding_window"):
        model.generate(**padded_left(ROWS, 4), max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_gradient_checkpointing_is_right_or_refused(kind):
    model, plain = attached(kind, next(iter(KINDS[kind]))), attached(kind, next(iter(KINDS[kind])))
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    if kind == "prefix":
        with pytest.raises(StateError, match="drops the key-value cache"):
            model(ROWS, labels=ROWS, use_cache=False)
        return
    for each in (model, plain):
        each(ROWS, labels=ROWS, use_cache=False).loss.backward()
    pairs = zip(model.model.lora_default.parameters(), plain.model.lora_default.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_models_that_cannot_have_them_are_refused_and_left_as_they_were(kind):
    for model, match in ((tiny.t5(), "encoder-decoder"), (tiny.Mlp(), "no language model")):
        with pytest.raises(TargetError, match=match):
            lk.attach(model, lk.LoraConfig(variant=kind))
        assert not hasattr(model, "_lorakit")
    bert = tiny.bert()
    cls = type(bert.bert)
    if kind == "prefix":
        with pytest.raises(TargetError, match="no key-value cache"):
            lk.attach(bert, lk.LoraConfig(variant=kind))
        assert type(bert.bert) is cls
        return
    lk.attach(bert, lk.LoraConfig(variant=kind, virtual_tokens=4))
    assert bert(ROWS).logits.shape == (3, 3)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_settings_of_module_updates_are_refused(kind):
    places = ({"targets": ["q_proj"]}, {"components": ["unet"]}, {"strict_targets": False})
    shapes = ({"rank": 4}, {"dropout": 0.1}, {"rslora": True}, {"alpha_pattern": {"q_proj": 3.0}}, {"lora_plus": 4.0})
    for given in (*places, *shapes):
        with pytest.raises(ConfigError, match=f"LoraConfig.{next(iter(given))} has no effect"):
            lk.attach(small("llama"), lk.LoraConfig(variant=kind, **given))
    with pytest.raises(TargetError, match="nothing to freeze"):
        lk.attach(small("llama"), lk.LoraConfig(variant=kind, freeze_a=True))


@pytest.mark.parametrize("kind", VIRTUAL)
def test_another_models_are_refused(kind):
    value = lk.capture(attached(kind, next(iter(KINDS[kind]))))
    with pytest.raises(LorakitError, match="virtual tokens do not fit"):
        lk.attach(small("gpt2"), value, force=True)
    with pytest.raises(AdapterError, match="another base"):
        lk.attach(small("gpt2"), value)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_algebra_that_has_no_meaning_is_refused(kind):
    value = lk.capture(attached(kind, next(iter(KINDS[kind]))))
    for wrong in (
        lambda: value + value,
        lambda: value * 2,
        lambda: lk.combine([value, value], method="ties", density=0.5),
    ):
        with pytest.raises(AdapterError, match="changes no weight"):
            wrong()


@pytest.mark.parametrize("kind", VIRTUAL)
def test_beside_lora_both_act_and_can_be_parted(kind):
    model = small("llama")
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj", "down_proj"], prompt=kind, virtual_tokens=N))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    both = lk.capture(model)
    assert (both.config.variant, both.config.prompt, both.config.targets) == ("lora", kind, ["down_proj", "q_proj"])
    lora, virtual = both.prune(["base_model"]), both.select(["base_model"])
    assert (lora.config.prompt, virtual.config.variant, list(virtual.updates)) == (None, kind, ["base_model"])
    apart = small("llama")
    lk.attach(lk.attach(apart, lora, "lora"), virtual, "virtual")
    lk.activate(apart, {"lora": 1.0, "virtual": 1.0})
    torch.testing.assert_close(apart(ROWS).logits, model(ROWS).logits, atol=1e-6, rtol=0)
    again = lk.attach(small("llama"), both)
    torch.testing.assert_close(again(ROWS).logits, model(ROWS).logits, atol=1e-6, rtol=0)
    lk.activate(again, {"default": {"model.layers": 0.5}})
    assert not torch.equal(again(ROWS).logits, model(ROWS).logits)
    lk.activate(again, {"default": {"base_model": 0.0}})
    only = lk.attach(small("llama"), lora)
    torch.testing.assert_close(again(ROWS).logits, only(ROWS).logits, atol=1e-6, rtol=0)
