"""PiSSA and OLoRA as plain LoRA of their base: what PEFT's model with the changed base computes, the untouched base and
the adapter do.
"""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch
from tiny import logits

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.checkpoint.residual import load_on, plain
from lorakit.errors import AdapterError, TargetError

TARGETS = {"llama": (tiny.llama, ["q_proj", "down_proj", "up_proj"]), "gpt2": (tiny.gpt2, ["c_attn", "mlp.c_proj"])}


def trained(kind: str, start: str, folder, **options):
    """A base on disk and PEFT's adapter, started and moved on; returns what that model computes."""
    make, targets = TARGETS[kind]
    make().save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        init_lora_weights=start,
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(make(), config)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=made))
    model.save_pretrained(folder / "adapter")
    return logits(model.eval())


# PEFT's own OLoRA runs on no Conv1D but square ones, and those it decomposes the wrong way round.
@pytest.mark.parametrize("kind,start", [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")])
def test_base_and_plain_adapter_compute_what_the_changed_base_did(kind, start, tmp_path):
    expected = trained(
        kind, start, tmp_path, rank_pattern={"down_proj": 4} if kind == "llama" else {}, use_rslora=kind == "gpt2"
    )
    adapter = plain(tmp_path / "adapter", tmp_path / "base")
    model = TARGETS[kind][0]()
    before = logits(model)
    torch.testing.assert_close(logits(lk.attach(model, adapter)), expected, atol=2e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-3
    assert {f.rank for f in adapter.factors.values()} <= {6, 8}  # twice that of the training
    adapter.save(tmp_path / "plain")
    assert lk.Adapter.load(tmp_path / "plain").factors.keys() == adapter.factors.keys()


def test_it_merges_into_the_base_as_it_is(tmp_path):
    expected = trained("llama", "pissa", tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = type(tiny.llama()).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


def test_pefts_own_conversion_gives_the_same_change(tmp_path):
    make, targets = TARGETS["llama"]
    model = peft.get_peft_model(make(), peft.LoraConfig(r=3, target_modules=targets, init_lora_weights="pissa"))
    make().save_pretrained(tmp_path / "base")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = plain(tmp_path / "adapter", tmp_path / "base"), lk.Adapter.load(tmp_path / "theirs")
    for module, f in theirs.factors.items():
        torch.testing.assert_close(ours.factors[module].delta(), f.delta(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_a_start_that_cannot_be_made_again_is_refused(start, tmp_path):
    trained("llama", "pissa", tmp_path)
    called(start, tmp_path, loftq_config={"loftq_iter": 2})
    with pytest.raises(AdapterError, match=f"initialized as '{start}', which cannot be recomputed"):
        load_on(tmp_path / "adapter", tmp_path / "base")


def called(start, folder, **more) -> None:
    """Write another initialization into the adapter's config."""
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start} | more))


@pytest.mark.parametrize("start", ["eva", "orthogonal", "mica", "gaussian", True, False])
def test_a_start_that_left_the_base_alone_is_read_as_it_is(start, tmp_path):
    trained("llama", True, tmp_path)
    before = lk.Adapter.load(tmp_path / "adapter")
    called(start, tmp_path)
    adapter = lk.Adapter.load(tmp_path / "adapter")
    assert adapter.digest() == before.digest()
    lk.attach(tiny.llama(), adapter)


def test_milora_of_a_fork_is_converted_like_pissa(tmp_path):
    """There it is subtracted from the base. Here the start is made by hand: the last singular values."""
    make, targets = TARGETS["llama"]
    make().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if not hasattr(module, "lora_A"):
                continue
            A, B, W = module.lora_A["default"].weight, module.lora_B["default"].weight, module.base_layer.weight
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)
            root = (S[-3:] * 3 / 5).sqrt()
            A.copy_(root[:, None] * Vt[-3:]), B.copy_(U[:, -3:] * root)
            W.sub_(5 / 3 * B @ A)
            for p in (A, B):
                p.add_(0.01 * torch.randn(p.shape, generator=made))
    model.save_pretrained(tmp_path / "adapter")
    called("milora", tmp_path)
    with pytest.raises(AdapterError, match="init_lora_weights is 'milora'"):
        lk.Adapter.load(tmp_path / "adapter")
    adapter = plain(tmp_path / "adapter", tmp_path / "base")
    torch.testing.assert_close(logits(lk.attach(make(), adapter)), logits(model.eval()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_other_weights_of_the_same_shapes_are_noticed(start, tmp_path):
    trained("llama", start, tmp_path)
    other = tiny.llama()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(0.02 * torch.randn_like(p))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="from other weights than"):
        load_on(tmp_path / "adapter", tmp_path / "other")
    assert load_on(tmp_path / "adapter", tmp_path / "other", force_base=True).factors


def test_pefts_olora_of_a_square_conv1d_is_refused(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["attn.c_proj"], init_lora_weights="olora", fan_in_fan_out=True)
    peft.get_peft_model(tiny.gpt2(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="is not a plain linear"):
        plain(tmp_path / "adapter", tmp_path / "base")


def test_another_base_is_refused_by_its_modules_or_shapes(tmp_path):
    trained("llama", "pissa", tmp_path)
    tiny.gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(TargetError, match="not in"):
        load_on(tmp_path / "adapter", tmp_path / "other")


def test_the_command_makes_it_plain_and_says_how_without_a_base(tmp_path, capsys):
    from lorakit.cli import run

    trained("llama", "pissa", tmp_path)
    assert run(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "peft"]) == 1
    assert "--base FOLDER" in capsys.readouterr().err
    assert (
        run(
            [
                "convert",
                str(tmp_path / "adapter"),
                str(tmp_path / "out"),
                "--to",
                "peft",
                "--base",
                str(tmp_path / "base"),
            ]
        )
        == 0
    )
    assert "initialized as pissa" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True
