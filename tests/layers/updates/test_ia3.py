"""(IA)³ beside PEFT's, its targets in many architectures, and its bias."""

from __future__ import annotations

import pytest
import quantized
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.errors import AdapterError, ConfigError, StateError, TargetError
from lorakit.layers.bases import base_of
from lorakit.layers.targets import module_names
from lorakit.layers.transformer_parts import attention_outputs, feedforward_outputs, ia3_targets

SETTINGS = {"variant": "ia3", "targets": "ia3"}


def tuned(model: nn.Module, **settings) -> nn.Module:
    lk.attach(model, lk.LoraConfig(**SETTINGS | settings))
    return tiny.randomise_factors(model)


class Net(nn.Module):
    """A convolution, linears of both layouts."""

    def __init__(self, groups: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, groups=groups)
        self.first, self.second = nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.first(self.conv(x).relu().flatten(1)).relu())


class Across(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Conv1D(7, 5), Conv1D(3, 7)

    def forward(self, x):
        return self.second(self.first(x).relu())


INPUT = {"net": torch.randn(2, 4, 4, 4), "across": torch.randn(2, 5)}
CASES = {
    "outputs": ("net", Net, ["conv", "first"], []),
    "inputs": ("net", Net, ["conv", "second"], ["conv", "second"]),
    "inputs of a grouped convolution": ("net", lambda: Net(2), ["conv"], ["conv"]),
    "Conv1D": ("across", Across, ["first", "second"], ["second"]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_pefts_does_and_each_reads_the_others_files(case, tmp_path):
    import peft

    kind, make, targets, feedforward = CASES[case]
    x = INPUT[kind]
    across = make is Across
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=across)
    theirs = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.attach(make(), lk.Adapter.load(tmp_path / "theirs"))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    base = make()(x)
    assert (ours(x) - base).abs().max() > 0.01 * base.abs().max()

    folder = lk.capture(ours).save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), folder).eval()
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-5, atol=1e-5)
    before = tiny.bits(make())
    lk.merge(ours)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    lk.unmerge(ours)
    lk.detach(ours)
    assert tiny.same_bits(tiny.bits(ours), before)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert, tiny.t5])
def test_its_own_targets_read_the_same_in_peft(make, tmp_path):
    import peft

    ours = tuned(make())
    folder = lk.capture(ours).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), folder).eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_its_gradients_are_pefts(make, tmp_path):
    import peft

    ours = tuned(make())
    folder = lk.capture(ours).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), folder, is_trainable=True)
    ids = torch.arange(3, 15)[None]
    for model in (ours, theirs):
        model.eval()  # GPT-2's dropout is another draw each time
        model(input_ids=ids, labels=ids).loss.backward()
    found = {n.replace(".lora_default.vector", ""): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    wanted = {
        n.split(".ia3_l")[0].removeprefix("base_model.model."): p.grad
        for n, p in theirs.named_parameters()
        if "ia3_l" in n
    }
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name].flatten(), rtol=1e-4, atol=1e-6)
    assert all(grad.abs().max() > 0 for grad in found.values())


def test_inputs_alone_are_scaled_before_the_base_with_the_same_result_as_beside_another(monkeypatch):
    model, x = Net().double(), INPUT["net"].double()
    tuned(model, targets=["second"], feedforward=["second"])
    alone = model(x)
    lk.attach(model, lk.LoraConfig(targets=["second"], rank=2), name="b")  # zero
    lk.activate(model, {"default": 1.0, "b": 1.0})
    torch.testing.assert_close(model(x), alone, rtol=1e-12, atol=1e-12)
    lk.activate(model, {"default": 0.5})
    half = model(x)
    lk.activate(model, {"default": 0.5, "b": 1.0})
    torch.testing.assert_close(model(x), half, rtol=1e-12, atol=1e-12)


def test_the_bias_is_scaled_too_and_merged_and_restored():
    model = nn.Sequential(nn.Linear(4, 3))
    before = tiny.bits(model)
    lk.attach(model, lk.LoraConfig(variant="ia3", targets=["0"]))
    factors = torch.tensor([2.0, -1.0, 0.0])
    with torch.no_grad():
        model[0].lora_default.vector.copy_(factors)
    wanted = factors * before["0.bias"].view(torch.float32) if before["0.bias"].dtype == torch.int32 else None
    y = model(torch.zeros(1, 4))
    lk.merge(model)
    torch.testing.assert_close(model(torch.zeros(1, 4)), y)
    torch.testing.assert_close(model[0].bias.detach(), y[0].detach())
    assert wanted is None or torch.equal(model[0].bias.detach(), wanted)
    lk.unmerge(model)
    assert tiny.same_bits({n: t for n, t in tiny.bits(model).items() if n in before}, before)


def test_a_merge_that_fails_at_the_bias_or_an_unmerge_at_the_weight_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 3)).half()
    with torch.no_grad():
        model[0].bias.fill_(60000.0)
    lk.attach(model, lk.LoraConfig(variant="ia3", targets=["0"], feedforward=[]))
    with torch.no_grad():
        model[0].lora_default.vector.fill_(1.5)
    before = tiny.bits(model)
    with pytest.raises(StateError, match=r"the bias of '0' infinite or NaN: its factors reach 1\.5, and float16"):
        lk.merge(model)
    assert tiny.same_bits(tiny.bits(model), before)
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    before = tiny.bits(model)
    lk.merge(model)
    merged = tiny.bits(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    changed = tiny.bits(model)
    with pytest.raises(StateError, match="unmerge of '0' would not restore"):
        lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), changed)
    with torch.no_grad():
        model[0].weight.copy_(merged["0.weight"].view(torch.float16).view(3, 4))
    lk.unmerge(model)
    assert tiny.same_bits(tiny.bits(model), before)


@pytest.mark.parametrize("feedforward", [[], ["0"]], ids=["outputs", "inputs"])
def test_factors_near_1_have_their_effect_in_bf16(feedforward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).bfloat16()
    x = torch.randn(32, 256).bfloat16()
    plain = model[0].weight.detach().double()
    lk.attach(model, lk.LoraConfig(variant="ia3", targets=["0"], feedforward=feedforward))
    with torch.no_grad():
        model[0].lora_default.vector.fill_(1.003)
    exact = x.double() @ plain.T
    # The change along what it should be: 1 if all of it is there. Each number's own rounding averages out.
    with torch.no_grad():
        change = (model(x).double() - exact) * exact
    assert float(change.sum() / (0.003 * exact.square()).sum()) == pytest.approx(1.0, abs=0.1)


def test_a_bias_that_another_adapter_trained_is_not_scaled_for_good():
    model = nn.Sequential(nn.Linear(4, 3))
    lk.attach(model, lk.LoraConfig(variant="ia3", targets=["0"], bias="all"))
    with pytest.raises(StateError, match="'0' has a bias that an adapter trained"):
        lk.merge(model)


# Where PEFT's own choice (TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING) is keys and values, as in the paper.
PEFTS = ("llama", "mistral", "t5", "gpt2", "bloom", "gpt_neox", "gpt_bigcode", "bert", "roberta", "deberta-v2")
# Where PEFT takes queries and values.
QUERIES = ("qwen2", "qwen3", "gemma", "gemma2", "phi", "gptj", "gpt_neo", "bart")
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "rotary_dim"), 4),
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "d_kv": 8,
    "head_dim": 8,
    "pad_token_id": 0,
    "attention_types": [[["global"], 2]],
}


def names_of(architecture: str) -> dict[str, nn.Module]:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        return module_names(AutoModel.from_config(AutoConfig.for_model(architecture, **SIZES)))


@pytest.mark.parametrize("architecture", [*PEFTS, *QUERIES])
def test_keys_values_and_the_feed_forwards_are_found_in_every_architecture(architecture):
    from peft.utils import constants

    theirs = set(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[architecture])
    inputs = set(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[architecture])
    names = names_of(architecture)
    if architecture in QUERIES:
        theirs = {name.replace("q_proj", "k_proj") for name in theirs}
    wanted = [name for name in names if any(name.endswith(f".{entry}") for entry in theirs)]
    # PEFT's "output.dense" is attention's output too.
    wanted = [name for name in wanted if ".attention.output." not in name]
    assert ia3_targets(names) == wanted
    assert feedforward_outputs(names) == [n for n in wanted if any(n.endswith(f".{entry}") for entry in inputs)]
    assert len(attention_outputs(names)) == sum(
        name.endswith((".v_proj", ".v", ".value", ".value_proj", ".c_attn", ".query_key_value")) for name in names
    )


def test_a_head_with_such_linears_is_no_attention():
    from transformers import AutoConfig, AutoModelForMaskedLM

    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("roberta", **SIZES))
    assert not any("lm_head" in name for name in ia3_targets(module_names(model)))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"feedforward": ["down_pro"]}, TargetError, "did you mean 'down_proj'"),
        ({"rank": 4}, ConfigError, r"LoraConfig.rank has no effect: variant='ia3' trains factors"),
        ({"dropout": 0.1}, ConfigError, r"LoraConfig.dropout has no effect"),
        ({"lora_plus": 4.0, "alpha_pattern": {"k_proj": 2.0}}, ConfigError, "remove alpha_pattern, lora_plus"),
        ({"variant": "lora", "feedforward": ["a"]}, ConfigError, "feedforward has an effect with variant='ia3' only"),
        ({"targets": ["embed_tokens"]}, TargetError, "an embedding, for which"),
    ],
)
def test_what_it_does_not_have_is_said(settings, error, said, tiny_llama):
    with pytest.raises(error, match=said):
        tuned(tiny_llama, **settings)


def test_a_model_without_attention_is_refused_with_what_to_do():
    with pytest.raises(TargetError, match=r"no attention to adapt.*\n.*name the modules"):
        tuned(nn.Sequential(nn.Linear(2, 2)))


def test_a_vector_of_the_other_side_is_refused_with_its_key(tmp_path):
    folder = lk.capture(tuned(Net(), targets=["first"], feedforward=[])).save(tmp_path)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"feedforward_modules": []', '"feedforward_modules": ["first"]'))
    with pytest.raises(AdapterError, match=r"first.ia3_l' has shape \[5, 1\]; expected \[1, in\]"):
        lk.Adapter.load(folder)


def test_arithmetic_on_it_is_refused_with_what_to_do_instead(tiny_llama):
    adapter = lk.capture(tuned(tiny_llama))
    with pytest.raises(AdapterError, match="activate the adapter with a weight"):
        adapter * 0.5
    with pytest.raises(AdapterError, match="merge the adapter into its base"):
        adapter.resize(4)


@pytest.mark.parametrize("variant", ["ia3", "bottleneck"])
def test_on_a_quantized_linear_it_computes_what_it_does_on_the_dequantized_one(variant):
    torch.manual_seed(0)
    W, bias, x = torch.randn(8, 64), torch.randn(8), torch.randn(3, 64)
    packed = nn.Sequential(quantized.linear4(W, bias))
    plain = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        plain[0].weight.copy_(base_of(packed[0]).dense(packed[0]))
        plain[0].bias.copy_(bias)
    own = {"feedforward": ["0"]} if variant == "ia3" else {"rank": 4}
    for settings in ({}, own):
        results = []
        for model in (packed, plain):
            lk.attach(model, lk.LoraConfig(variant=variant, targets=["0"], **settings))
            tiny.randomise_factors(model)
            loss = model(x).square().sum()
            loss.backward()
            grads = [p.grad.clone() for p in model[0].lora_default.parameters()]
            results.append((loss.detach(), *grads))
            lk.detach(model)
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
