"""Runs that train virtual tokens: their settings, their starts, LoRA beside them, and what is refused before a step."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.bases.load import load_model
from lorakit.config.virtual_tokens import VIRTUAL
from lorakit.errors import AdapterError, ConfigError
from lorakit.formats.peft_prompts import ENCODER, FOLDER
from lorakit.methods import method_of
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.sweep.sweep_config import expand
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.*PEFT loads the LoRA alone")


def trained_of(job) -> dict[str, torch.Tensor]:
    return {name: p for name, p in job.model.named_parameters() if p.requires_grad}


def test_a_text_starts_as_the_tokens_of_its_tokenizer(make_config):
    text = "Say it:"
    job = set_up(make_config(method="prompt", prompt_text=text, virtual_tokens=3))
    ids = job.base.processor(text)["input_ids"][:3]
    expected = load_model(job.config.model, torch.float32, CPU).get_input_embeddings().weight[ids]
    (own,) = trained_of(job).values()
    assert torch.equal(own, expected)


@pytest.mark.parametrize(
    "settings, count",
    [
        ({"method": "prompt", "virtual_tokens": 3}, lambda d, h, layers: 3 * d),
        ({"method": "prefix", "virtual_tokens": 3}, lambda d, h, layers: 3 * 2 * layers * h),
        (
            {"method": "prefix", "virtual_tokens": 3, "prompt_encoder": "mlp", "encoder_size": 5},
            lambda d, h, layers: 3 * h + (h + 1) * 5 + (5 + 1) * 2 * layers * h,
        ),
        (
            {"method": "p_tuning", "virtual_tokens": 3, "encoder_size": 5},
            lambda d, h, layers: 3 * d + (d + 1) * 5 + (5 + 1) * 5 + (5 + 1) * d,
        ),
        (
            {
                "method": "p_tuning",
                "virtual_tokens": 3,
                "prompt_encoder": "lstm",
                "encoder_size": 5,
                "encoder_layers": 1,
            },
            lambda d, h, layers: 3 * d + 2 * 4 * 5 * (d + 5 + 2) + (10 + 1) * 10 + (10 + 1) * d,
        ),
    ],
)
def test_the_parameters_are_those_counted_by_hand(make_config, settings, count):
    job = set_up(make_config(**settings))
    config = job.model.config
    kept = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    expected = count(config.hidden_size, kept, config.num_hidden_layers)
    assert sum(p.numel() for p in trained_of(job).values()) == expected


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_lora_with_virtual_tokens_trains_both_and_its_result_loads(make_config, kind, tmp_path):
    config = make_config(rank=2, targets=["q_proj"], prompt=kind, virtual_tokens=3, steps=4, learning_rate=1e-2)
    job = set_up(config)
    factors = job.rate_factors(trained_of(job))
    assert {name.rsplit(".", 1)[1]: factor for name, factor in factors.items()} == {
        "A": ("", 1.0),
        "B": ("", 1.0),
        "embeddings": ("virtual", {"prefix": 80.0, "prompt": 10.0}[kind]),
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train(config.replace(out=str(tmp_path / "run")), QUIET)
    assert sum("PEFT loads the LoRA alone" in str(each.message) for each in said) == 1
    adapter = lk.Adapter.load(result.adapter)
    assert (adapter.config.prompt, adapter.config.rank) == (kind, 2)
    assert (result.adapter / FOLDER).is_dir()
    fresh = lk.capture(job.model)
    assert not torch.equal(adapter.updates["base_model"].embeddings, fresh.updates["base_model"].embeddings)
    assert any(u.B.any() for u in adapter.factors.values())


def test_a_killed_run_of_lora_with_virtual_tokens_ends_with_the_same_bits(make_config, tmp_path):
    config = make_config(
        rank=2, prompt="prefix", prompt_encoder="mlp", virtual_tokens=3, steps=4, save_every=2, keep=3, eval_every=2
    ).replace(out=str(tmp_path / "whole"))
    train(config, QUIET)
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-4")
    shutil.rmtree(resumed.path / "adapter")
    train(config.replace(out=str(resumed.path)), QUIET)
    files = sorted((whole.path / "adapter").rglob("*.safetensors"))
    assert [file.name for file in files] == ["adapter_model.safetensors", "adapter_model.safetensors", ENCODER]
    for file in files:
        assert file.read_bytes() == (resumed.path / file.relative_to(whole.path)).read_bytes()


def test_a_run_goes_on_from_an_encoder_with_all_its_tensors(make_config, tmp_path):
    config = make_config(method="prefix", prompt_encoder="mlp", virtual_tokens=3, steps=3, learning_rate=1e-2)
    first = train(config.replace(out=str(tmp_path / "first")), QUIET)
    job = set_up(make_config(method="prefix", adapter=str(first.adapter), steps=1).replace(out=str(tmp_path / "next")))
    own = {name.split(".encoder.")[1]: p for name, p in trained_of(job).items()}
    kept = load_file(first.adapter / ENCODER)
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], kept[name]) for name in kept)
    assert job.config.virtual_tokens == 3


def test_a_run_goes_on_with_the_dropout_of_its_encoder(make_config, tmp_path):
    lstm = {"method": "p_tuning", "prompt_encoder": "lstm", "encoder_dropout": 0.3, "virtual_tokens": 3}
    first = train(make_config(**lstm, steps=1).replace(out=str(tmp_path / "first")), QUIET)
    job = set_up(
        make_config(method="p_tuning", adapter=str(first.adapter), steps=1).replace(out=str(tmp_path / "next"))
    )
    assert job.config.encoder_dropout == 0.3
    assert job.model.base_model.get_submodule(f"lora_{job.adapter}").encoder.lstm_head.dropout == 0.3


@pytest.mark.parametrize(
    "given, encoder, factor, said",
    [
        ({"method": "prefix"}, "mlp", 80 / 80, "3 virtual tokens (prefix)"),
        ({"method": "p_tuning"}, "mlp", 10.0, "3 virtual tokens (p_tuning)"),
        ({"prompt": "prefix"}, "mlp", 80.0, "3 virtual tokens (prefix)"),
    ],
)
def test_tokens_that_come_without_their_encoder_are_trained_at_their_own_rate(
    make_config, tmp_path, given, encoder, factor, said
):
    config = make_config(**given, prompt_encoder=encoder, encoder_size=5, virtual_tokens=3, steps=1)
    first = train(config.replace(out=str(tmp_path / "first")), QUIET)
    for file in first.adapter.rglob(ENCODER):
        file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the encoder is missing
        same = {"learning_rate": "auto", **{name: value for name, value in given.items() if name == "method"}}
        job = set_up(make_config(**same, adapter=str(first.adapter), steps=1).replace(out=str(tmp_path / "next")))
        if config.method == "prefix":
            contradicting = make_config(**same, adapter=str(first.adapter), prompt_encoder=encoder, steps=1)
            with pytest.raises(ConfigError, match="prompt_encoder: the adapter has 'none', given is 'mlp'"):
                set_up(contradicting.replace(out=str(tmp_path / "contradicting")))
    tokens = {name: p for name, p in trained_of(job).items() if name.endswith("embeddings")}
    assert len(tokens) == 1
    assert {value for name, value in job.rate_factors(trained_of(job)).items() if name in tokens} == {
        ("virtual" if factor != 1 else "", factor)
    }
    assert job.method.trained(job.config).endswith(said)


def test_an_encoder_has_its_own_rate_where_the_runs_is_auto(make_config):
    for rate, factor in (("auto", ("encoder", 0.05)), (1e-2, ("", 1.0))):
        job = set_up(make_config(method="prefix", prompt_encoder="mlp", learning_rate=rate))
        assert set(job.rate_factors(trained_of(job)).values()) == {factor}


def test_the_loss_goes_down(make_config):
    for kind in VIRTUAL:
        config = make_config(method=kind, virtual_tokens=4, steps=12, learning_rate=5e-2, eval_every=12, patience=0)
        config = config.replace(out=f"{config.out}-{kind}")
        job = set_up(config)
        before = job.task.evaluate(job.base, job.held_out, 8)
        train(config.replace(out=f"{config.out}-trained"), QUIET)
        adapter = lk.Adapter.load(f"{config.out}-trained/adapter")
        after = adapter.metadata["metrics"]["held_out_loss"]
        assert after < next(iter(before.values())) - 0.05, kind


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"method": "prefix", "packing": True}, "packing: virtual tokens"),
        ({"method": "prefix", "gradient_checkpointing": True}, "gradient_checkpointing: a prefix"),
        ({"prompt": "prefix", "gradient_checkpointing": True}, "gradient_checkpointing: a prefix"),
        ({"variant": "prefix"}, "use method: prefix; or prompt: prefix"),
    ],
)
def test_what_does_not_go_with_virtual_tokens_is_refused_before_a_step(make_config, settings, match):
    with pytest.raises(ConfigError, match=match):
        set_up(make_config(**settings))


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"method": "prefix", "rank": 4}, "rank has no effect with method: prefix"),
        ({"method": "prefix", "prompt": "prompt"}, "prompt"),
        ({"method": "full", "virtual_tokens": 4}, "virtual_tokens"),
        ({"virtual_tokens": 4}, "virtual_tokens has an effect with virtual tokens"),
        ({"method": "prefix", "prompt_encoder": "lstm"}, "none of prefix's"),
        (
            {"method": "prompt", "find_lr": True, "learning_rate": "auto"},
            "find_lr trains several adapters on one base, which method: prompt",
        ),
    ],
)
def test_settings_of_other_methods_are_errors(make_config, settings, match):
    with pytest.raises(ConfigError, match=match):
        make_config(**settings)


def test_a_sweep_is_refused_with_what_to_do(make_config):
    for settings in ({"method": "prompt"}, {"prompt": "prompt"}):
        assert "one by one" in method_of(settings.get("method", "lora")).alone(make_config(**settings))[1]
        with pytest.raises(ConfigError, match="virtual tokens in front of each row"):
            expand({**make_config(**settings).model_dump(exclude_unset=True), "learning_rate": [1e-3, 1e-2]})


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_run_does_not_go_on_from_an_adapter_of_another_method(make_config, kind, tmp_path):
    lora = train(make_config(rank=2, steps=1).replace(out=str(tmp_path / "lora")), QUIET)
    with pytest.raises(AdapterError, match=f"method: {kind} trains {kind} alone"):
        set_up(make_config(method=kind, adapter=str(lora.adapter)))
    own = train(make_config(method=kind, virtual_tokens=2, steps=1).replace(out=str(tmp_path / "own")), QUIET)
    with pytest.raises(ConfigError, match=f"use method: {kind}"):
        set_up(make_config(adapter=str(own.adapter)))


def test_rows_must_fit_beside_virtual_tokens(make_config):
    from lorakit.errors import TrainError

    with pytest.raises(TrainError, match=r"beside 90 virtual tokens"):
        set_up(make_config(method="prompt", virtual_tokens=90))


def test_start_panels_say_what_is_trained(make_config):
    said = {kind: method_of(kind).trained(make_config(method=kind, virtual_tokens=7)) for kind in VIRTUAL} | {
        "lora": method_of("lora").trained(make_config(prompt="prefix", rank=2))
    }
    assert said["prefix"] == "7 virtual tokens (prefix)"
    assert said["p_tuning"] == "7 virtual tokens (p_tuning, mlp)"
    assert said["lora"].endswith("20 virtual tokens (prefix)")
