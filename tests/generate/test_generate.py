"""Generating with tiny models: batching changes nothing, text ends where it should, the model is left unchanged."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import ConfigError, DataError
from lorakit.generate.generate import generate, stream
from lorakit.generate.sampling import nucleus

TEXTS = ["a", "The cat", "hello there, you", "x" * 30, "café", "b"]


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in TEXTS]


def greedy_by_hand(model, prompt: list[int], steps: int) -> list[int]:
    """Decode greedily: one row, no padding, no cache."""
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def make_it_say(model, tokenizer, text: str, after: int) -> None:
    """Set GPT-2's position embeddings so that greedy decoding after `after` tokens gives `text`, then the end token."""
    target = [*tokenizer.encode(text), tokenizer.eos_token_id]
    width = model.config.n_embd
    assert len(target) <= width
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        # untied from the zero embedding
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        for step, token in enumerate(target):
            model.transformer.wpe.weight[after - 1 + step, step] = 1
            model.lm_head.weight[token, step] = 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_greedy_text_is_the_same_for_every_batch_size(family, request, tokenizer, prompts):
    model = request.getfixturevalue(family)
    one_by_one = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=1)
    assert len(set(one_by_one)) > 3, "the model must tell the prompts apart for this test to mean something"
    for batch_size in (2, 4, 32):
        assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == one_by_one


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_text_takes_the_most_likely_token_each_step(family, request, tokenizer, prompts):
    model = request.getfixturevalue(family)
    expected = []
    for prompt in prompts:
        ids = greedy_by_hand(model, prompt, 10)
        ids = ids[: ids.index(1)] if 1 in ids else ids
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert generate(model, tokenizer, prompts, max_new_tokens=10) == expected


def test_the_models_own_sampling_settings_do_not_apply(llama, tokenizer, prompts):
    plain = generate(llama, tokenizer, prompts, max_new_tokens=12)
    settings = llama.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.repetition_penalty = True, 5.0, 3, 9.0
    assert generate(llama, tokenizer, prompts, max_new_tokens=12) == plain


def test_text_ends_at_the_end_token_without_prompt_and_special_tokens(gpt2, tokenizer):
    make_it_say(gpt2, tokenizer, "so it ends", after=3)
    prompt = tokenizer.encode("abc")
    assert generate(gpt2, tokenizer, [prompt], max_new_tokens=30) == ["so it ends"]
    assert "".join(stream(gpt2, tokenizer, prompt, max_new_tokens=30)) == "so it ends"


def test_text_ends_at_every_end_token_of_the_models_settings(gpt2, tokenizer):
    make_it_say(gpt2, tokenizer, "one|two", after=3)
    gpt2.generation_config.eos_token_id = [1, tokenizer.encode("|")[0]]
    prompt = tokenizer.encode("abc")
    assert generate(gpt2, tokenizer, [prompt], max_new_tokens=20) == ["one"]
    assert "".join(stream(gpt2, tokenizer, prompt, max_new_tokens=20)) == "one"


def test_generation_stops_at_the_earliest_stop_text(gpt2, tokenizer):
    make_it_say(gpt2, tokenizer, "first END second STOP", after=3)
    prompt = tokenizer.encode("abc")
    steps = []
    hook = gpt2.register_forward_hook(lambda *_: steps.append(1))
    assert generate(gpt2, tokenizer, [prompt], max_new_tokens=30, stop=["STOP", " END"]) == ["first"]
    hook.remove()
    assert len(steps) == len("first END"), "generation continued after the stop text"
    assert "".join(stream(gpt2, tokenizer, prompt, max_new_tokens=30, stop=["STOP", " END"])) == "first"


def test_text_held_back_for_a_stop_text_is_streamed_at_the_end(gpt2, tokenizer):
    make_it_say(gpt2, tokenizer, "go on EN", after=3)
    pieces = list(stream(gpt2, tokenizer, tokenizer.encode("abc"), stop=["END"], max_new_tokens=30))
    assert "".join(pieces) == "go on EN"
    assert pieces[-1] == "EN"


def test_no_streamed_piece_splits_a_character(gpt2, tokenizer):
    text = "né £5 日本 🙂 x"
    make_it_say(gpt2, tokenizer, text, after=2)
    pieces = list(stream(gpt2, tokenizer, tokenizer.encode("ab"), max_new_tokens=60))
    assert "".join(pieces) == text
    assert len(pieces) == len(text), "each character, of one to four tokens, comes as one piece"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_of_an_incomplete_character_are_streamed_at_the_end(gpt2, tokenizer):
    make_it_say(gpt2, tokenizer, "ab日", after=2)
    prompt = tokenizer.encode("ab")
    cut = generate(gpt2, tokenizer, [prompt], max_new_tokens=4)  # two of the last character's three bytes
    assert cut[0].startswith("ab\ufffd")
    assert ["".join(stream(gpt2, tokenizer, prompt, max_new_tokens=4))] == cut


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_streamed_text_is_the_generated_text(family, request, tokenizer, prompts):
    model = request.getfixturevalue(family)
    for prompt, text in zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=15)):
        assert "".join(stream(model, tokenizer, prompt, max_new_tokens=15)) == text


def test_a_seed_repeats_the_samples_and_leaves_the_global_random_state(llama, tokenizer, prompts):
    torch.manual_seed(11)
    expected_next = torch.rand(1)
    torch.manual_seed(11)
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95}
    first = generate(llama, tokenizer, prompts, seed=5, **options)
    assert torch.equal(torch.rand(1), expected_next)
    assert generate(llama, tokenizer, prompts, seed=5, **options) == first
    assert generate(llama, tokenizer, prompts, seed=6, **options) != first
    one = list(stream(llama, tokenizer, prompts[0], seed=5, **options))
    assert list(stream(llama, tokenizer, prompts[0], seed=5, **options)) == one


def test_a_tiny_top_p_is_greedy(llama, tokenizer, prompts):
    greedy = generate(llama, tokenizer, prompts, max_new_tokens=8)
    assert generate(llama, tokenizer, prompts, max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=0) == greedy
    assert "".join(stream(llama, tokenizer, prompts[1], max_new_tokens=8, temperature=1.0, top_p=1e-6)) == greedy[1]


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    torch.testing.assert_close(nucleus(logits, 0.75), torch.tensor([0.0, 0.625, 0.0, 0.375]))
    torch.testing.assert_close(nucleus(logits, 1.0), torch.tensor([0.15, 0.5, 0.05, 0.3]))
    rows = torch.stack([logits, logits.flip(0)])
    torch.testing.assert_close(nucleus(rows, 0.75), torch.tensor([[0.0, 0.625, 0.0, 0.375], [0.375, 0.0, 0.625, 0.0]]))


def test_every_modules_training_flag_is_restored(llama, tokenizer, prompts):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    generate(llama, tokenizer, prompts, max_new_tokens=2)
    assert [module.training for module in llama.modules()] == before
    list(stream(llama, tokenizer, prompts[0], max_new_tokens=2))
    assert [module.training for module in llama.modules()] == before
    stopped_early = stream(llama, tokenizer, prompts[0], max_new_tokens=20)
    next(stopped_early)
    stopped_early.close()
    assert [module.training for module in llama.modules()] == before


def test_dropout_is_off_while_generating(gpt2, tokenizer, prompts):
    gpt2.train()  # GPT-2's dropout is 0.1
    assert generate(gpt2, tokenizer, prompts, max_new_tokens=10) == generate(
        gpt2, tokenizer, prompts, max_new_tokens=10
    )


def test_inference_mode_does_not_leak_between_pieces(llama, tokenizer, prompts):
    for _ in stream(llama, tokenizer, prompts[0], max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_progress_counts_every_prompt_once(llama, tokenizer, prompts):
    done = []
    generate(llama, tokenizer, prompts, max_new_tokens=2, batch_size=4, on_batch=done.append)
    assert done == [4, 2]


def test_no_prompts_give_no_texts(llama, tokenizer):
    assert generate(llama, tokenizer, []) == []


def test_an_empty_prompt_is_named(llama, tokenizer):
    with pytest.raises(DataError, match=r"prompts\[1\] is empty"):
        generate(llama, tokenizer, [[5], []], max_new_tokens=4)


def test_a_prompt_too_long_for_the_models_positions_is_named_before_anything_runs(llama, tokenizer):
    fits, too_long = [5] * 118, [5] * 119
    assert len(generate(llama, tokenizer, [fits], max_new_tokens=10)) == 1
    with pytest.raises(DataError, match=r"prompts\[1\] has 119 tokens.*128 positions\n.*118 tokens"):
        generate(llama, tokenizer, [fits, too_long], max_new_tokens=10)
    with pytest.raises(DataError, match="119 tokens"):
        stream(llama, tokenizer, too_long, max_new_tokens=10)  # at the call, not at the first piece


def test_new_tokens_that_leave_no_room_for_a_prompt_are_refused(llama, tokenizer):
    with pytest.raises(ConfigError, match="max_new_tokens is 128, but the model has 128 positions"):
        generate(llama, tokenizer, [[5]], max_new_tokens=128)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop": "END"}, "stop is 'END'"),
        ({"stop": [""]}, "none of them empty"),
    ],
)
def test_settings_out_of_range_are_refused(llama, tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(llama, tokenizer, [[5]], **settings)
