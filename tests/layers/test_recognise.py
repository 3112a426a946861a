"""Digests of code: the same for the same words, another for any other; and those of the installed transformers are known."""

from __future__ import annotations

import functools
import importlib
import linecache

import pytest
import torch
from block_models import adapted, assert_same_gradients, build, gradients, kinds, plain, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit.layers import blocks
from lorakit.layers.recognise import digest, main

SOURCE = '''
def forward(self, x, scale=1.0):
    """What it does."""
    a = self.first(x)  # a comment
    if scale:
        a = a * scale

    return self.second(a)
'''


def made(source: str, name: str = "forward"):
    """A function of this source, which `inspect` finds."""
    file = f"<made {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict = {}
    exec(compile(source, file, "exec"), scope)
    return scope[name]


SAME = {
    "other comments": SOURCE.replace("# a comment", "# other words"),
    "no comments": SOURCE.replace("  # a comment", ""),
    "another docstring": SOURCE.replace("What it does.", "Else."),
    "no docstring": SOURCE.replace('    """What it does."""\n', ""),
    "other white space": SOURCE.replace("a * scale", "a  *  scale").replace("\n\n", "\n").replace("self.second(a)", "self.second( a )"),
    "deeper": "if True:" + SOURCE.replace("\n", "\n    "),
    "annotations": SOURCE.replace("x, scale=1.0", "x: int, scale: float = 1.0"),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_words_have_the_same_digest(change):
    assert SAME[change] != SOURCE
    assert digest(made(SAME[change])) == digest(made(SOURCE)) != ""


WORDS = ["self.first", "x)", "a = a", "* scale", "if scale", "return self.second", "self, x", "x, scale"]


@pytest.mark.parametrize("word", WORDS)
def test_one_other_word_is_another_digest(word):
    changed = {
        "self.first": "self.third", "x)": "x + x)", "a = a": "b = a", "* scale": "+ scale", "if scale": "if not scale",
        "return self.second": "return self.first", "self, x": "self, y", "x, scale": "x, scales",
    }  # fmt: skip
    assert word in SOURCE
    assert digest(made(SOURCE.replace(word, changed[word]))) not in ("", digest(made(SOURCE)))


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 10_000))
def test_a_line_left_out_is_another_digest(place):
    lines = SOURCE.strip().splitlines()
    bodies = [i for i, line in enumerate(lines) if line.strip() and "def " not in line and '"""' not in line and "if " not in line]
    del lines[bodies[place % len(bodies)]]
    source = "\n".join(lines).replace("    if scale:\n\n", "")
    try:
        function = made(source + "\n")
    except SyntaxError:  # the only line below `if`
        return
    assert digest(function) != digest(made(SOURCE))


def hidden():
    scope: dict = {}
    exec("def forward(self, x): return x", scope)
    return scope["forward"]


def doubling(function):
    @functools.wraps(function)
    def run(*args):
        return 2 * function(*args)

    return run


@pytest.mark.parametrize(
    "function",
    [
        hidden(),
        lambda self, x: x,
        nn.Module.__repr__.__call__,
        len,
        None,
        3,
        doubling(made(SOURCE)),
        torch.nn.functional.linear,
        functools.partial(len),
    ],
    ids=["no source", "lambda", "slot", "builtin", "None", "number", "wrapped", "torch's", "partial"],
)
def test_what_is_not_a_plain_function_has_no_digest(function):
    assert digest(function) == ""


def test_a_function_that_is_all_docstring_or_one_line_has_one_without_an_error():
    assert digest(made('def forward(self):\n    """Nothing."""\n'))
    assert digest(made("def forward(self): return 1\n"))


KNOWN = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "granite": "Granite", "gemma": "Gemma", "smollm3": "SmolLM3",
    "phi3": "Phi3", "olmo2": "Olmo2", "gemma2": "Gemma2",
}  # fmt: skip
NOT_KNOWN = {  # for what they compute otherwise
    ("gemma", "RMSNorm"), ("gemma2", "RMSNorm"), ("olmo2", "RMSNorm"), ("phi3", "MLP"), ("phi3", "Attention"), ("olmo2", "Attention"),
    ("gemma2", "Attention"), ("smollm3", "Attention"),
}  # fmt: skip
PARTS = {"MLP": blocks.GatedMlpBlock, "RMSNorm": blocks.RmsNormBlock, "Attention": blocks.AttentionBlock}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", KNOWN)
def test_the_installed_transformers_is_recognised(model, part):
    """If this fails after an upgrade, read what changed in the forward, and add its digest to `blocks` if the block still fits."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    cls = getattr(module, KNOWN[model] + part)
    assert blocks._mixin_for(cls) is (None if (model, part) in NOT_KNOWN else PARTS[part])


def test_an_attention_is_known_with_the_rotation_it_calls_only():
    from transformers.models.llama import modeling_llama as llama

    one = llama.LlamaAttention.forward
    code = type(one)(one.__code__, {**one.__globals__, "rotate_half": lambda x: x}, "forward")
    assert digest(code) == digest(one)
    assert blocks._mixin_for(type("OtherAttention", (nn.Module,), {"forward": one})) is blocks.AttentionBlock
    assert blocks._mixin_for(type("OtherAttention", (nn.Module,), {"forward": code})) is None
    nothing = type(one)(one.__code__, {}, "forward")
    assert blocks._mixin_for(type("OtherAttention", (nn.Module,), {"forward": nothing})) is None


def test_the_class_must_be_named_for_what_it_is():
    from transformers.models.llama.modeling_llama import LlamaMLP

    assert blocks._mixin_for(type("Feed", (nn.Module,), {"forward": LlamaMLP.forward})) is None


def test_the_digests_can_be_printed(capsys):
    main()
    lines = dict(reversed(line.split()) for line in capsys.readouterr().out.splitlines())
    assert lines["LlamaMLP.forward"] in blocks._GATED_MLP
    assert lines["LlamaRMSNorm.forward"] in blocks._RMS_NORM
    assert lines["LlamaAttention.forward"] in blocks._ATTENTION
    assert lines["rotate_half"] == blocks._ROPE["rotate_half"]


# ---- modules whose code is not known, in a model ----


def swapped(model: nn.Module) -> set[str]:
    lk.attach(model, lk.LoraConfig(rank=2, targets=["gate_proj", "q_proj"]))
    return set(kinds(model).values())


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    from transformers.models.llama.modeling_llama import LlamaMLP

    class TwiceMLP(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class SameMLP(LlamaMLP):
        pass

    for cls, known in ((TwiceMLP, False), (SameMLP, True)):
        model = build()
        for layer in model.model.layers:
            layer.mlp.__class__ = cls
        expected = model(tokens()).logits
        assert ("GatedMlpBlock" in swapped(model)) == known
        assert torch.equal(model(tokens()).logits, expected)
        lk.detach(model)
        assert type(model.model.layers[0].mlp) is cls


def test_a_forward_whose_source_cannot_be_had_is_left_alone():
    from transformers.models.llama.modeling_llama import LlamaMLP

    scope = {"LlamaMLP": LlamaMLP}
    exec("class HiddenMLP(LlamaMLP):\n    def forward(self, x):\n        return self.down_proj(self.up_proj(x))", scope)
    model = build()
    model.model.layers[0].mlp.__class__ = scope["HiddenMLP"]
    swapped(model)
    assert [n for n, k in kinds(model).items() if k == "GatedMlpBlock"] == ["model.layers.1.mlp"]


def test_a_class_that_was_patched_is_seen_as_it_is_now(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    assert "GatedMlpBlock" in swapped(build())
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert "GatedMlpBlock" not in swapped(build())


def test_a_forward_of_the_instance_is_left_alone():
    model = build()
    model.model.layers[0].mlp.forward = lambda x: x
    swapped(model)
    assert "model.layers.0.mlp" not in kinds(model)


@pytest.mark.parametrize("act", ["gelu_python_tanh", "relu", "gelu", "gelu_pytorch_tanh", "silu", "swish"])
def test_only_known_activations_are_computed_by_the_block(act, calls):
    base, model = build(hidden_act=act), adapted(trained=False, config={"hidden_act": act})
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    assert calls["gated_mlp"] == 2 * (act in ("gelu_pytorch_tanh", "silu", "swish"))


def test_an_activation_of_the_same_name_is_not_taken_for_the_known_one(calls):
    class SiLU(nn.Module):
        def forward(self, x):
            return x.sin()

    model = adapted()
    model.model.layers[0].mlp.act_fn = SiLU()
    assert_same_gradients(gradients(model), gradients(plain(model)))
    assert calls["gated_mlp"] == 1
