"""Packed rows are computed as each one alone, whatever the architecture and the attention; what cannot is refused."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import tiny_lm
import torch
import transformers
from rich.console import Console

import lorakit as lk
from lorakit.data.batches import collate
from lorakit.data.packing import collate_packed
from lorakit.errors import ConfigError, TrainError
from lorakit.tasks import task_of
from lorakit.tasks.text.causal_loss import row_losses
from lorakit.tasks.text.packed import check_packing
from lorakit.train.memory import planner_for
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.sweep.find_lr import find
from lorakit.train.train import train

QUIET = Progress(quiet=True)
SIZES = [40, 7, 12, 9, 3, 21, 30, 5]
# What attends and nothing else, in the field's spellings: rotary and learnt positions, windows, soft caps, biases.
KINDS = ["Llama", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Mistral", "GPT2", "GPTNeoX", "Phi3", "Cohere2"]
WINDOW = {"sliding_window": 8}


def build(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **({"intermediate_size": 48} if kind != "GPT2" else {}),
        **({"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "GPT2" else {}),
        **({"num_key_value_heads": 2} if kind not in ("GPT2", "GPTNeoX") else {}),
        **({"head_dim": 8} if kind.startswith(("Gemma", "Qwen3")) else {}),
        **(WINDOW if kind in ("Gemma2", "Gemma3Text", "Mistral", "Phi3", "Cohere2") else {}),
    )
    torch.manual_seed(0)
    classes = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    model = getattr(transformers, classes.get(kind, f"{kind}ForCausalLM"))(config)
    if kind != "Gemma2":  # which knows "eager" only
        model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def adapted(model):
    lk.attach(model, lk.LoraConfig(rank=4))
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return model


def gradients(model, batch, weights):
    model.zero_grad()
    losses = row_losses(model, batch)
    (losses * weights).sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(kind, attention):
    model = adapted(build(kind, attention))
    check_packing(model)
    items = tiny_lm.items(SIZES)
    weights = torch.linspace(0.5, 2, len(items))  # a row of a packed batch has a weight of its own
    packed = collate_packed(items, tiny_lm.PAD)
    assert len(packed["input_ids"]) < len(items)
    losses, found = gradients(model, packed, weights)
    alone = [gradients(model, collate([item], tiny_lm.PAD), weight) for item, weight in zip(items, weights)]
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]), rtol=1e-5, atol=1e-5)
    for name, gradient in found.items():
        expected = sum(each[name] for _, each in alone)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name)


def test_attention_with_our_own_backward_in_16_bits_keeps_rows_apart():
    model = adapted(build("Llama", dtype=torch.bfloat16))
    assert model.config._attn_implementation == "lorakit_sdpa"
    items = tiny_lm.items(SIZES)
    packed = row_losses(model, collate_packed(items, tiny_lm.PAD))
    torch.testing.assert_close(packed, row_losses(model, collate(items, tiny_lm.PAD)), rtol=2e-2, atol=0.1)


REFUSED = {
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "BloomForCausalLM has no position_ids"),
    "Mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, "MptForCausalLM has no position_ids"),
    "Mamba2": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
        "Mamba2ForCausalLM has no position_ids",
    ),
    "OPT": (
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        "OPTForCausalLM does not keep packed rows apart",
    ),
    "Lfm2": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        r"Lfm2ForCausalLM does not keep packed rows apart.*conv, full_attention",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_keep_rows_apart_is_refused_by_what_it_lacks(kind):
    values, said = REFUSED[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{"vocab_size": 258, "initializer_range": 0.3} | values)
    )
    with pytest.raises(TrainError, match=said):
        check_packing(model.eval())


def test_a_model_that_ignores_positions_is_found_out():
    model = build("GPT2")
    model.transformer.wpe.register_forward_pre_hook(lambda m, args: (torch.arange(args[0].shape[-1])[None],))
    with pytest.raises(TrainError, match="does not keep packed rows apart"):
        check_packing(model)


# ------------------------------------------------------------------------------------- runs


@pytest.fixture
def mixed(make_config):
    """`mixed(**changes)`: a run whose batches mix long and short rows, all computed at once."""

    def make(**changes):
        values = {"batch_size": 8, "micro_batch": 8, "group_by_length": False, "sample_tokens": 0, "steps": 4}
        return make_config(**values | changes)

    return make


def test_a_packed_run_has_the_steps_and_losses_of_an_unpacked_one(mixed, tmp_path):
    plain, packed = mixed(out=tmp_path / "plain"), mixed(out=tmp_path / "packed", packing=True)
    first, second = train(plain, QUIET), train(packed, QUIET)
    assert first.step == second.step
    for ours, theirs in zip(RunFolder(packed.out).rows(), RunFolder(plain.out).rows(), strict=True):
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    a, b = lk.Adapter.load(first.adapter), lk.Adapter.load(second.adapter)
    for module in a.factors:
        torch.testing.assert_close(a.factors[module].B, b.factors[module].B, rtol=1e-2, atol=1e-4)


def test_a_packed_run_resumes_to_the_last_bit(mixed, tmp_path):
    config = mixed(packing=True, dropout=0.1, save_every=2, keep=3)
    train(config, QUIET)
    whole, other = RunFolder(config.out), RunFolder(tmp_path / "other")
    shutil.copytree(whole.path, other.path)
    shutil.rmtree(other.checkpoints / "step-4")
    train(config.replace(out=str(other.path)), QUIET)
    assert json.loads((whole.adapter / "lorakit.json").read_text())["recipe"]["packing"] is True
    for file in ("adapter_model.safetensors", "lorakit.json"):
        assert (whole.adapter / file).read_bytes() == (other.adapter / file).read_bytes()


def test_the_panel_says_how_much_padding_it_saves(mixed):
    screen = io.StringIO()
    train(mixed(packing=True), Progress(Console(file=screen, width=200)))
    line = next(line for line in screen.getvalue().splitlines() if "packing" in line)
    packed, plain = (float(word.rstrip("%")) for word in line.split() if word.endswith("%"))
    assert 0 <= packed < plain < 100


def test_the_plan_counts_the_mask_that_keeps_rows_apart(mixed):
    estimates = [
        planner_for(mixed(packing=packing), torch.float32, torch.device("cpu")).estimate(4, 512)
        for packing in (False, True)
    ]
    mask = 2 * 1024 * 1024  # bytes, one a pair of tokens, in two sequences of two rows each
    assert estimates[1].total - estimates[0].total >= mask


def test_a_base_that_cannot_pack_is_refused_before_its_first_step(mixed, tmp_path):
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=258, hidden_size=32, n_layer=1, n_head=4))
    config = mixed(packing=True, model=tiny_lm.save(tmp_path / "bloom", bloom))
    with pytest.raises(TrainError, match="packing: BloomForCausalLM has no position_ids"):
        train(config, QUIET)
    assert RunFolder(config.out).rows() == []


def test_packing_with_compile_is_refused_and_the_search_for_a_rate_goes_without(mixed):
    with pytest.raises(ConfigError, match="packing is not tested with compile"):
        mixed(packing=True, compile=True)
    config = mixed(packing=True, find_lr=True, learning_rate="auto", steps=20)
    assert find(config, QUIET).rate > 0


def test_a_packed_batch_is_planned_as_the_largest_that_is_made():
    planned = task_of("causal_lm").example(4, 40, packed=True)
    made = collate_packed(tiny_lm.items([40, 40, 40, 40]), tiny_lm.PAD)
    assert planned.keys() == made.keys()
    assert planned["input_ids"].numel() >= made["input_ids"].numel()
    assert planned["sizes"].tolist() == [40] * 4
    assert task_of("causal_lm").example(1, 40, packed=True)["input_ids"].shape == (1, 40)
    assert task_of("causal_lm").example(3, 40, packed=True)["position_ids"].shape == (2, 80)
