"""Scaled rotary positions: as transformers computes them, remembered by adapters, written into merged models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_lm
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import lorakit as lk
from lorakit.bases.load import embedded_folder, load_config
from lorakit.bases.rope import RECORD, check_scaling, parsed, record_of, recorded, scaled, scaling_of
from lorakit.checkpoint.long_context import with_scaling
from lorakit.checkpoint.merge import merge_checkpoint
from lorakit.errors import AdapterError, ConfigError, LorakitWarning
from lorakit.export.export import export
from lorakit.export.merged import export_merged
from lorakit.train.sweep.sweep_config import expand

IDS = torch.arange(2, 152)[None]  # more than the 96 positions of the tiny model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_lm.save(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def stretched(base):
    """An adapter with values, trained for positions that are scaled by 4."""
    model = lk.load_base(base, dtype="fp32", rope_scaling="yarn:4")
    lk.attach(model, lk.LoraConfig(rank=2))
    for name, parameter in model.named_parameters():
        if name.endswith("B") and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return lk.capture(model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    "scaling, rope",
    [
        ("yarn:4", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}),
        ("linear:2.5", {"rope_type": "linear", "factor": 2.5}),
    ],
)
def test_it_computes_what_transformers_does_with_that_config(base, scaling, rope):
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {**config.rope_parameters, **rope}
    config.max_position_embeddings = int(96 * rope["factor"])
    expected = logits(AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32))
    model = lk.load_base(base, dtype="fp32", rope_scaling=scaling)
    assert torch.equal(logits(model), expected)
    assert (logits(lk.load_base(base, dtype="fp32")) - expected).abs().max() > 1e-2
    assert model.config.max_position_embeddings == config.max_position_embeddings
    assert scaling_of(model.config) == scaling


def test_only_full_attention_is_stretched_where_sliding_layers_have_positions_of_their_own():
    config = Gemma3TextConfig(num_hidden_layers=6, max_position_embeddings=128)
    changed = scaled(config, "linear:8", "tiny")
    assert changed.rope_parameters["full_attention"]["factor"] == 8
    assert changed.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert scaling_of(config) is None  # the one that was given is unchanged
    assert scaling_of(changed) == "linear:8"


def test_what_cannot_be_scaled_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="has no rotary positions"):
        scaled(tiny_lm.gpt2().config, "yarn:4", "gpt2")
    once = scaled(load_config(base), "yarn:4", "tiny")
    assert scaled(once, "yarn:4", "tiny") is not None
    with pytest.raises(ConfigError, match="scaled already"):
        scaled(once, "linear:2", "tiny")


@pytest.mark.parametrize(
    "text, message",
    [
        ("yarm:4", "did you mean 'yarn'"),
        ("dynamic:2", "expected one of yarn:4, linear:4"),
        ("yarn", "a factor above 1"),
        ("yarn:1", "a factor above 1"),
        ("yarn:nan", "a factor above 1"),
        ("linear:four", "a factor above 1"),
    ],
)
def test_a_wrong_setting_says_what_is_expected(text, message):
    with pytest.raises(ConfigError, match=message):
        parsed(text)


def test_an_adapter_remembers_it_in_its_files_and_another_base_is_refused(base, stretched, tmp_path):
    stretched.save(tmp_path / "adapter")
    read = lk.Adapter.load(tmp_path / "adapter")
    assert record_of(read.metadata) == "yarn:4"
    with pytest.raises(AdapterError, match=r"scaled by yarn:4, and those of this base are not scaled.*\n.*yarn:4"):
        lk.attach(lk.load_base(base, dtype="fp32"), read)
    with pytest.raises(AdapterError, match="those of this base are linear:4"):
        lk.attach(lk.load_base(base, dtype="fp32", rope_scaling="linear:4"), read)
    lk.attach(lk.load_base(base, dtype="fp32", rope_scaling="yarn:4.0"), read)
    lk.attach(lk.load_base(base, dtype="fp32"), read, force=True)


def test_adapters_of_different_positions_do_not_share_a_base(stretched):
    assert recorded([stretched.metadata]) == "yarn:4"
    assert recorded([{}]) is None
    assert recorded([]) is None
    with pytest.raises(AdapterError, match="those of the base, yarn:4"):
        recorded([stretched.metadata, {}])


def test_a_damaged_record_is_an_error():
    with pytest.raises(AdapterError, match="record of its base's positions is damaged"):
        record_of({RECORD: "yarn"})
    with pytest.raises(AdapterError, match="not scaled"):
        check_scaling(None, {RECORD: "yarn:4"})


def test_a_merged_model_has_the_positions_in_its_config(base, stretched, tmp_path):
    model = lk.attach(lk.load_base(base, dtype="fp32", rope_scaling="yarn:4"), stretched)
    merge_checkpoint(base, stretched, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["max_position_embeddings"] == 384
    assert config["rope_parameters"]["original_max_position_embeddings"] == 96


def test_a_config_keeps_its_own_spelling(base, stretched, tmp_path):
    config = json.loads((Path(base) / "config.json").read_text())
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "max_position_embeddings")}

    def scaled_config(changed):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return with_scaling(changed, tmp_path, [stretched])

    made = scaled_config(old | {"rope_theta": 10000.0, "max_position_embeddings": 96})
    assert made["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}
    assert made["rope_theta"] == 10000.0
    assert made["max_position_embeddings"] == 384
    assert scaled_config(made) == made  # once is enough
    early = scaled_config(old)  # the first Llamas' configs say neither theta nor positions
    assert early["max_position_embeddings"] == 4 * LlamaConfig().max_position_embeddings
    with pytest.raises(ConfigError, match="scaled already"):
        scaled_config(made | {"rope_scaling": {"type": "linear", "factor": 2}})
    with pytest.raises(ConfigError, match="no rotary positions"):
        scaled_config({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match=r"no config\.json"):
        with_scaling({}, tmp_path, [stretched])


def test_combined_adapters_keep_the_record_they_share(stretched):
    assert record_of((stretched + stretched).metadata) == "yarn:4"
    plain = lk.Adapter(stretched.config, stretched.updates)
    with pytest.raises(AdapterError, match="different rotary positions"):
        lk.combine([stretched, plain], [0.5, 0.5])


def test_training_on_with_other_positions_is_recorded_and_using_them_warned_of(base, stretched):
    plain = lk.Adapter(stretched.config, stretched.updates)
    model = lk.attach(lk.load_base(base, dtype="fp32", rope_scaling="linear:2"), plain, trainable=True)
    assert record_of(lk.capture(model).metadata) == "linear:2"
    with pytest.warns(LorakitWarning, match="scaled by linear:2, and the adapter was trained without"):
        lk.attach(lk.load_base(base, dtype="fp32", rope_scaling="linear:2"), plain)


def test_a_merged_gguf_has_the_scaling(tmp_path):
    gguf = pytest.importorskip("gguf")
    export_merged(*on_embedded(), tmp_path / "m.gguf", verify=True)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["llama.rope.scaling.type"].contents() == "yarn"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0


def on_embedded():
    """An adapter of the embedded model with positions scaled by 4, and the model's folder."""
    model = lk.attach(lk.load_base("embedded", dtype="fp32", rope_scaling="yarn:4"), lk.LoraConfig(rank=2))
    made = lk.capture(model)
    updates = {m: u.map(lambda _, t: t + 0.01) for m, u in made.updates.items()}
    return replace(made, updates=updates), str(embedded_folder())


def test_an_exported_adapter_is_compared_on_the_scaled_base(base, stretched, tmp_path):
    exported = export(stretched, tmp_path / "out", "vllm", fix=True, verify=True, base=base)
    assert exported.logits is not None
    assert any("rotary positions scaled by yarn:4" in note for note in exported.notes)


def test_runs_of_a_sweep_have_one_base():
    with pytest.raises(ConfigError, match="one base"):
        expand({"data": "x.jsonl", "rope_scaling": ["yarn:2", "yarn:4"]})
