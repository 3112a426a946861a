"""Describing adapters and models: norms against ΔW itself in float64, zero updates, modules."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import tiny_lm
import torch
from architectures import causal_lm
from made_experts import llama4

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lora import Factors
from lorakit.analysis.inspect import describe_adapter, describe_model, is_model, norm
from lorakit.analysis.training_notes import training
from lorakit.errors import LorakitError


def random(*shape: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=made)


KINDS = {
    "linear": Factors(random(3, 7), random(5, 3), alpha=6.0),
    "rslora": Factors(random(4, 7), random(5, 4), alpha=6.0, rslora=True),
    "transposed": Factors(random(3, 7), random(5, 3), alpha=6.0, transposed=True),
    "embedding": Factors(random(3, 20), random(6, 3), alpha=1.0, kind="embedding"),
    "conv": Factors(random(3, 4, 3, 2), random(5, 3, 1, 1), alpha=2.0, kind="conv"),
    "grouped conv": Factors(random(4, 2, 3), random(6, 4, 1), alpha=2.0, kind="conv", groups=2),
    "one number": Factors(random(1, 1), random(1, 1), alpha=1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_delta_w(kind):
    f = KINDS[kind]
    update = f.scale * (f.B.flatten(1).double() @ f.A.flatten(1).double())
    assert update.shape.numel() == f.delta().numel()
    assert norm(f) == pytest.approx(float(update.norm()), rel=1e-12)
    assert norm(f) == pytest.approx(float(f.delta().double().norm()), rel=1e-5)


def test_the_norm_of_a_packed_projection():
    model = tiny.mlp()
    lk.attach(model, lk.LoraConfig(rank=2, targets=["lin1"], packed={"lin1": [True, False, True]}))
    tiny.randomise_factors(model)
    f = lk.capture(model).factors["lin1"]
    update = f.delta().double()  # [12, 20]
    assert not update[4:8].any()
    assert norm(f) == pytest.approx(float(update.norm()), rel=1e-6)


def test_the_norm_of_pefts_grouped_convolution():
    """PEFT groups B while A reads all channels, so the update is the kernel of two consecutive convolutions."""
    A, B = random(4, 6, 3), random(8, 2, 1)
    f = Factors(A, B, alpha=2.0, kind="conv", groups=2)
    unit = torch.eye(6 * 3, dtype=torch.float64).reshape(18, 6, 3)  # each input of one place, in turn
    inner = torch.nn.functional.conv1d(unit, A.double())
    kernel = f.scale * torch.nn.functional.conv1d(inner, B.double(), groups=2)  # [18, 8, 1]
    assert norm(f) == pytest.approx(float(kernel.norm()), rel=1e-12)


def test_a_tiny_update_is_not_reported_as_zero():
    assert norm(Factors(random(2, 3) * 1e-25, random(4, 2) * 1e-25, 1.0)) > 0
    assert norm(Factors(random(2, 3), torch.zeros(4, 2), 1.0)) == 0


@pytest.fixture
def adapter():
    """An adapter of a Llama with one zero ΔW, a saved norm and a recipe."""
    model = lk.attach(
        tiny.llama(),
        lk.LoraConfig(rank=4, alpha=8, targets=["q_proj", "down_proj"], save_modules=["norm"], base="some/base"),
    )
    tiny.randomise_factors(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_default.B.zero_()
    made = lk.capture(model)
    return lk.Adapter(
        made.config, made.factors, made.saved, {**made.metadata, "recipe": {"steps": 7}, "metrics": {"loss": 0.5}}
    )


def test_describe_adapter_reports_its_facts(adapter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    facts = describe_adapter(adapter, "here")
    values = facts.to_dict()
    assert (values["base"], values["rank"], values["parameters"]) == ("some/base", 4, adapter.parameters)
    by_name = {m["name"]: m for m in values["modules"]}
    down = by_name["model.layers.0.mlp.down_proj"]
    assert (down["size_in"], down["size_out"], down["rank"], down["alpha"], down["scale"], down["kind"]) == (
        24,
        16,
        4,
        8,
        2,
        "linear",
    )
    assert down["norm"] == pytest.approx(
        float(adapter.factors["model.layers.0.mlp.down_proj"].delta().norm()), rel=1e-5
    )
    assert by_name["model.layers.1.mlp.down_proj"]["norm"] == 0
    json.dumps(values)
    facts.show()
    out = capsys.readouterr().out
    assert f"here: rank 4, {adapter.parameters:,} parameters in 4 modules; base: some/base" in out
    assert "1 of 4 modules have ΔW = 0 and no effect" in out
    assert "saved weight: model.norm.weight [16]" in out
    assert "recipe: steps 7" in out
    assert "metrics: loss 0.5" in out
    assert len([line for line in out.splitlines() if line.strip().startswith("down_proj")]) == 1
    facts.show(every_module=True)
    assert len([line for line in capsys.readouterr().out.splitlines() if "mlp.down_proj " in line]) == 2


def test_an_adapter_of_a_pipeline_counts_its_modules_by_component(capsys):
    update = Factors(random(2, 4), random(4, 2), 2.0)
    modules = [f"unet.mid_block.{n}" for n in "abc"] + [f"text_encoder.text_model.{n}" for n in "de"]
    describe_adapter(lk.Adapter(lk.LoraConfig(rank=2), dict.fromkeys(modules, update)), "here").show()
    assert "unet: 3 modules; text_encoder: 2 modules" in capsys.readouterr().out


def test_a_trained_adapter_has_no_zero_update_to_report(adapter, capsys):
    kept = {m: f for m, f in adapter.factors.items() if not m.endswith("1.mlp.down_proj")}
    describe_adapter(lk.Adapter(adapter.config, kept), "here").show()
    assert "ΔW = 0" not in capsys.readouterr().out


def test_adapters_with_only_embeddings_or_only_saved_weights_are_described(capsys):
    model = tiny.randomise_factors(lk.attach(tiny.embedder(), lk.LoraConfig(rank=2, targets=["emb"])))
    (facts,) = describe_adapter(lk.capture(model), "x").modules
    assert (facts.kind, facts.size_in, facts.size_out) == ("embedding", 20, 8)
    describe_adapter(lk.Adapter(lk.LoraConfig(), {}, {"head.bias": torch.zeros(3)}), "x").show()
    assert "rank 0" in capsys.readouterr().out


def test_a_models_modules_are_listed_without_its_weights(tmp_path, capsys):
    folder = tiny_lm.save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    facts = describe_model(str(folder))
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.parameters == sum(p.numel() for p in tiny_lm.llama().parameters())
    all_linear = {name for name, _, _, linear in facts.modules if linear}
    attached = lk.capture(lk.attach(tiny_lm.llama(), lk.LoraConfig()))
    assert all_linear == set(attached.factors)
    assert {name for name, *_ in facts.modules} - all_linear == {"model.embed_tokens", "lm_head"}
    facts.show()
    out = capsys.readouterr().out
    assert " * q_proj" in out
    assert ["*", "q_proj", "Linear", "32x32", "2"] in [line.split() for line in out.splitlines()]
    facts.show(every_module=True)
    assert "model.layers.1.mlp.gate_proj" in capsys.readouterr().out


def test_what_no_adapter_reaches_or_would_be_heard_from_is_said(tmp_path, capsys):
    experts = tmp_path / "llama4"
    model = llama4()
    model.save_pretrained(experts)
    facts = describe_model(str(experts))
    assert set(facts.unreached) >= {
        "model.layers.*.feed_forward.experts.gate_up_proj",
        "model.layers.*.feed_forward.experts.down_proj",
    }
    assert 0.2 < facts.unreached_share < 1
    facts.show()
    out = capsys.readouterr().out
    assert f"not reached by any adapter: {100 * facts.unreached_share:.3g} % of the weights" in out
    assert "left out of 'all-linear': model.layers.0.feed_forward.experts" in out
    assert "without transformers' experts interface" in out
    mixtral = tmp_path / "mixtral"
    causal_lm("mixtral").save_pretrained(mixtral)
    facts = describe_model(str(mixtral))
    assert ("model.layers.0.mlp.experts.down_proj", "ExpertWeight", [4, 32, 48], True) in facts.modules
    mamba = tmp_path / "mamba"
    causal_lm("mamba").save_pretrained(mamba)
    facts = describe_model(str(mamba))
    assert not {name for name, *_ in facts.modules if name.endswith(("conv1d", "dt_proj"))}
    facts.show()
    assert "left out of 'all-linear': backbone.layers.0.mixer.x_proj" in capsys.readouterr().out


def test_gpt2s_transposed_layers_are_listed(tmp_path):
    facts = describe_model(str(tiny_lm.save(tmp_path / "m", tiny_lm.gpt2())))
    assert ("transformer.h.0.attn.c_attn", "Conv1D", [32, 96], True) in facts.modules


def test_is_model_distinguishes_models_from_adapters(tmp_path, adapter):
    assert is_model("embedded")
    assert is_model(str(tiny_lm.save(tmp_path / "m")))
    assert not is_model(str(adapter.save(tmp_path / "a")))
    assert not is_model(str(tmp_path / "nothing"))


def test_a_model_folder_with_an_invalid_config_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LorakitError, match="cannot load"):
        describe_model(str(tmp_path))


def test_a_norm_that_cancels_is_small_not_nan():
    """trace((BᵀB)(AAᵀ)) cancels here, and may round below zero."""
    A = torch.stack([torch.ones(5), torch.ones(5)])
    B = torch.stack([torch.ones(4), -torch.ones(4)], 1)  # the two ranks cancel exactly
    value = norm(Factors(A, B, 1.0))
    assert value == 0 or (math.isfinite(value) and value < 1e-6)


def test_effective_rank_and_dead_modules_of_every_kind():
    A, B = torch.linalg.qr(random(9, 9))[0][:3], torch.linalg.qr(random(6, 6))[0][:, :3]
    even = Factors(A, B, alpha=3.0)
    one = Factors(A, B * torch.tensor([1.0, 0, 0]), alpha=3.0)
    loha = Loha(random(30, 2), random(2, 20), random(30, 2), random(2, 20), alpha=4.0)
    bias = Dense(None, bias=torch.ones(6))
    made = lk.Adapter(
        lk.LoraConfig(),
        {
            "even": even,
            "one": one,
            "dead": replace(even, B=B * 0),
            "dora": Dora(replace(even, B=B * 0), torch.ones(6, 1)),
            "loha": loha,
            "bias": bias,
            "dead too": Dense(torch.zeros(4, 4)),
        },
    )
    facts = describe_adapter(made, "x")
    by_name = {m.name: m for m in facts.modules}
    assert by_name["even"].effective_rank == pytest.approx(3, rel=1e-5)
    assert by_name["one"].effective_rank == pytest.approx(1, rel=1e-5)
    assert by_name["one"].stable_rank == pytest.approx(1, rel=1e-5)
    assert (by_name["loha"].kind, by_name["loha"].size_in, by_name["loha"].size_out) == ("loha", 20, 30)
    assert by_name["loha"].norm == pytest.approx(float(loha.delta().norm()), rel=1e-5)
    assert by_name["dora"].dora
    assert (by_name["dora"].kind, by_name["dora"].alpha) == ("linear", 3.0)
    assert facts.dead == ["dead", "dead too"]  # a DoRA with B = 0 may still change norms, and a bias change counts
    facts.show(every_module=True)
    json.dumps(facts.to_dict(), allow_nan=False)


def test_file_base_and_ranks_are_reported(tmp_path, capsys):
    live = lk.attach(
        tiny_lm.llama(), lk.LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    )
    made = lk.capture(tiny.randomise_factors(live)).to(torch.bfloat16)
    made = replace(made, embeddings={"<s1>": torch.ones(2, 8)})
    folder = replace(made, embeddings={}).save(tmp_path / "a")
    facts = describe_adapter(made, str(folder), form="peft")
    assert (facts.format, facts.targets, facts.ranks, facts.alphas) == (
        "peft",
        ["q_proj", "v_proj"],
        {"4": 2, "2": 2},
        {"8": 4},
    )
    assert facts.dtypes == {"bfloat16": 8, "float32": 1}
    assert facts.bytes == (folder / "adapter_model.safetensors").stat().st_size
    facts.show()
    out = capsys.readouterr().out
    assert "format peft; bfloat16, float32; " in out
    assert "fingerprint of the base: LlamaForCausalLM, " in out
    assert "textual-inversion embedding: <s1> [2, 8]" in out


def test_trigger_words_tags_and_settings_are_read_from_kohyas_header(capsys):
    header = {
        "ss_tag_frequency": json.dumps({"10_sks dog": {"a dog": 12, "grass ": 3}, "img": {"grass": 4, "bad": "x"}}),
        "ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}, "2_reg": {}}),
        "modelspec.trigger_phrase": "in the style of sks",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "None",
        "ss_steps": "1200",
        "ss_training_comment": "hi\x1b[31m",
    }
    notes = training(header)
    assert notes["trigger words"] == ["in the style of sks", "sks dog", "reg"]
    assert notes["commonest tags"] == {"a dog": 12, "grass": 7}
    assert (notes["learning rate"], notes["steps"]) == ("0.0001", "1200")
    assert "unet learning rate" not in notes
    made = lk.Adapter(
        lk.LoraConfig(),
        {"x": Factors(random(1, 3), random(2, 1), 1.0)},
        metadata={"header": header, "recipe": {"x": "\x1b[2J"}},
    )
    describe_adapter(made, "x").show()
    out = capsys.readouterr().out
    assert "trigger words: in the style of sks, sks dog, reg" in out
    assert "commonest tags: a dog (12), grass (7)" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "header",
    [
        None,
        3,
        {},
        {"ss_tag_frequency": "{"},
        {"ss_tag_frequency": "[1]"},
        {"ss_tag_frequency": '{"a": 1}'},
        {"ss_steps": None},
    ],
)
def test_a_malformed_header_is_ignored(header):
    assert training(header) == {}
