"""BitFit, LayerNorm tuning and linear probes: adapters that hold trained copies of base weights alone."""

from __future__ import annotations

import pytest
import tiny
import tiny_lm
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.layers.norms import norms
from lorakit.methods import method_of
from lorakit.train.config import TrainConfig

RUN = {"data": "rows.jsonl", "model": "a base"}


def attached(model: nn.Module, method: str, task_type: str = "CAUSAL_LM", **settings) -> nn.Module:
    """The model with what a method trains, moved away from the base."""
    config = TrainConfig(**RUN, method=method, **settings)
    method_of(method).attach(model, config, "default", task_type)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def trained(model: nn.Module) -> set[str]:
    return set(lk.capture(model).saved)


def classifier():
    from transformers import LlamaForSequenceClassification

    config = tiny.llama().config
    config.num_labels = 3
    torch.manual_seed(3)
    return LlamaForSequenceClassification(config).eval()


MADE = {
    "bitfit": (tiny.gpt2, "CAUSAL_LM", lambda n, p: n.endswith(".bias")),
    "layernorm": (tiny.llama, "CAUSAL_LM", lambda n, p: p.dim() == 1),
    "layernorm of gpt2": (tiny.gpt2, "CAUSAL_LM", lambda n, p: "ln_" in n),
    "probe": (classifier, "SEQ_CLS", lambda n, p: n.startswith("score.")),
    "bitfit of a classifier": (tiny.bert, "SEQ_CLS", lambda n, p: n.endswith(".bias") or n.startswith("classifier")),
}


@pytest.mark.parametrize("case", MADE)
def test_it_trains_what_it_says_and_the_folder_computes_the_same_in_peft(case, tmp_path):
    import peft

    make, task_type, expected = MADE[case]
    base = make()
    named = {name for name, p in base.named_parameters() if expected(name, p)}
    ours = attached(make(), case.split()[0], task_type)
    assert trained(ours) == named
    folder = lk.capture(ours).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), folder).eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(ours), atol=1e-5, rtol=0)
    assert (tiny.logits(theirs) - tiny.logits(base)).abs().max() > 1e-2
    again = lk.attach(make(), lk.Adapter.load(folder))
    assert torch.equal(tiny.logits(again), tiny.logits(ours))


def test_the_same_can_be_had_by_a_config_in_python(tiny_gpt2):
    lk.attach(tiny_gpt2, lk.LoraConfig(targets="none", bias="all"))
    assert trained(tiny_gpt2) == trained(attached(tiny.gpt2(), "bitfit"))


def test_settings_of_modules_have_no_effect_where_none_is_adapted(tiny_gpt2):
    for given in ({"rank": 4}, {"dropout": 0.1}, {"lora_plus": 4.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))} has no effect: targets='none' adapts no module"):
            lk.attach(tiny_gpt2, lk.LoraConfig(targets="none", bias="all", **given))
    assert not hasattr(tiny_gpt2, "_lorakit")


def test_merged_into_the_base_it_stays(tiny_gpt2):
    before = {name: p.detach().clone() for name, p in tiny_gpt2.named_parameters()}
    ours = attached(tiny_gpt2, "bitfit")
    tuned = tiny.logits(ours)
    lk.merge(ours)
    assert torch.equal(tiny.logits(ours), tuned)
    lk.unmerge(ours)
    lk.detach(ours)
    assert all(torch.equal(before[name], p) for name, p in ours.named_parameters())


@pytest.mark.parametrize("targets", [None, ".*input_layernorm|.*norm"])
def test_pefts_own_layernorm_tuning_is_read(tmp_path, targets):
    import peft

    names = targets or ["input_layernorm", "post_attention_layernorm", "model.norm"]
    theirs = peft.get_peft_model(
        tiny.llama(), peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=names, modules_to_save=["lm_head"])
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    ours = lk.attach(tiny.llama(), adapter)
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), atol=1e-5, rtol=0)
    lk.capture(ours).save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "again").eval()
    torch.testing.assert_close(tiny.logits(again), tiny.logits(theirs), atol=1e-5, rtol=0)


def test_norms_are_found_by_what_they_are():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

    model = nn.ModuleDict(
        {
            "first": nn.LayerNorm(4),
            "group": nn.GroupNorm(2, 4),
            "rms": nn.RMSNorm(4, eps=1e-6),
            "own": Own(),
            "batch": nn.BatchNorm1d(4),
            "no_weight": nn.LayerNorm(4, elementwise_affine=False),
            "linear": nn.Linear(4, 4),
            "prelu": nn.PReLU(4),
        }
    )
    assert norms(model) == ["first", "group", "own", "rms"]
    assert norms(tiny.bert()) == ["LayerNorm"]
    assert len(norms(tiny.t5())) > 0
    assert norms(nn.Sequential(nn.Linear(2, 2))) == []


def test_what_a_base_lacks_is_said_with_what_to_use_instead(tiny_llama):
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has none\n.*layernorm"):
        attached(tiny_llama, "bitfit")
    with pytest.raises(ConfigError, match=r"LlamaForSequenceClassification has none"):
        attached(classifier(), "bitfit", "SEQ_CLS")  # its head is no bias either
    with pytest.raises(ConfigError, match=r"no.*norms|norms.*has none"):
        attached(nn.Sequential(nn.Linear(2, 2)), "layernorm")
    with pytest.raises(ConfigError, match=r"CAUSAL_LM.*\n.*classification.*save_modules"):
        attached(tiny_llama, "probe")
    with pytest.raises(TargetError, match="no module matches 'score'"):
        attached(tiny_llama, "probe", save_modules=["score"])
    assert not hasattr(tiny_llama, "lora_default")


def test_another_module_may_be_trained_beside(tiny_llama):
    assert trained(attached(tiny_llama, "probe", save_modules=["lm_head"])) == {"lm_head.weight"}
    assert "lm_head.weight" in trained(attached(tiny.llama(), "layernorm", save_modules=["lm_head"]))


def test_copies_are_trained_in_float32_unless_a_precision_is_given():
    for name in ("bitfit", "layernorm", "probe"):
        method = method_of(name)
        chosen = method.precision(TrainConfig(**RUN, method=name), torch.device("cpu"))
        assert chosen.value == torch.float32
        assert "round" in chosen.reason
        given = method.precision(TrainConfig(**RUN, method=name, precision="bf16"), torch.device("cpu"))
        assert given.value == torch.bfloat16


def test_an_adapter_of_another_method_is_refused(tmp_path, tiny_gpt2):
    lora = lk.capture(lk.attach(tiny_gpt2, lk.LoraConfig(rank=2, targets=["c_attn"]))).save(tmp_path)
    for name in ("bitfit", "layernorm", "probe"):
        with pytest.raises(AdapterError, match=rf"updates of kind lora, and method: {name} trains none"):
            method_of(name).start(TrainConfig(**RUN, method=name, adapter=str(lora)))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        {"bottleneck": "pfeiffer", "bottleneck_size": 8, "drop_layers": 1},
        {"bottleneck": "adapter_l", "bottleneck_size": 4},
        {"bottleneck": "houlsby", "reduction": 8.0},
    ],
)
def test_a_run_from_a_bottleneck_has_its_settings_and_no_others(made, recorded, tmp_path):
    """With the recipe of lorakit's own runs, and without: made in Python, or by a run of another version."""
    from dataclasses import replace

    from lorakit.train.start import resolved

    method = method_of("bottleneck")
    adapter = lk.capture(attached(tiny.llama(), "bottleneck", **made))
    recipe = {"recipe": {"method": "bottleneck", **made}} if recorded else {}
    folder = str(replace(adapter, metadata={**adapter.metadata, **recipe}).save(tmp_path))
    config = resolved(TrainConfig(**RUN, method="bottleneck", adapter=folder))
    assert {name: getattr(config, name) for name in made} == made
    assert method.trained(config) == method.trained(TrainConfig(**RUN, method="bottleneck", **made))
    assert resolved(TrainConfig(**RUN, method="bottleneck", adapter=folder, **made)) == config  # as when resumed
    other = {"bottleneck_size": 32} if "reduction" not in made else {"bottleneck": "pfeiffer"}
    for given in (other, {"drop_layers": 4}):
        with pytest.raises(ConfigError, match=f"contradicts settings that were given:\n  {next(iter(given))}: "):
            resolved(TrainConfig(**RUN, method="bottleneck", adapter=folder, **given))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"method": "bottleneck", "bottleneck_size": 32, "reduction": 8},
            "bottleneck_size (32) has no effect with reduction (8)",
        ),
        ({"method": "bitfit", "rank": 4}, "rank has no effect with method: bitfit; remove it (it is for method: lora)"),
        ({"method": "full", "rank": 4}, "rank has no effect with method: full"),
        ({"method": "probe", "targets": ["q_proj"]}, "targets has no effect with method: probe"),
        ({"task": "classification", "packing": True}, "packing has no effect with task: classification"),
        (
            {"labels": ["a", "b"]},
            "labels has no effect with task: causal_lm; remove it, or give --task classification (it is for",
        ),
    ],
)
def test_settings_of_another_method_or_task_are_an_error_that_says_whose_they_are(settings, said):
    with pytest.raises(ConfigError) as raised:
        TrainConfig(data="rows.jsonl", **settings)
    assert said in str(raised.value)


def test_all_settings_of_a_run_at_once_may_have_their_defaults():
    """As the config in a run's folder has them."""
    for method in ("full", "bitfit", "lora"):
        config = TrainConfig(**RUN, method=method)
        assert TrainConfig(**config.model_dump(exclude={"base"})) == config
    by_full = TrainConfig(**RUN, rank=4, seed=3).by_method("full")
    assert (by_full.method, by_full.rank, by_full.seed) == ("full", 16, 3)


def test_a_classifier_is_trained_by_each_and_says_the_same_when_it_is_loaded(make_config, tmp_path):
    from transformers import LlamaForSequenceClassification

    from lorakit.train.progress import Progress
    from lorakit.train.train import train

    rows = [{"text": f"{name} sees {what}", "label": what} for name in tiny_lm.NAMES for what in ("tea", "coffee")]
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
    for name, learning_rate in (("probe", 5e-2), ("layernorm", 5e-2), ("ia3", 2e-1), ("bottleneck", 2e-2)):
        settings = {"task": "classification", "data": data, "steps": 12, "eval_every": 6, "patience": 0}
        config = make_config(method=name, **settings, learning_rate=learning_rate, out=tmp_path / name)
        result = train(config, Progress(quiet=True))
        adapter = lk.Adapter.load(result.adapter)
        assert "score.weight" in adapter.saved
        assert (set(adapter.saved) == {"score.weight"}) == (name != "layernorm")
        assert adapter.metadata["data"]["labels"] == ["coffee", "tea"]
        torch.manual_seed(99)
        model = LlamaForSequenceClassification.from_pretrained(config.model, num_labels=2, pad_token_id=0).eval()
        lk.attach(model, adapter)
        ids = tiny_lm.tokenizer()(rows[0]["text"], return_tensors="pt")["input_ids"]
        first = model(input_ids=ids).logits
        torch.manual_seed(1)
        again = LlamaForSequenceClassification.from_pretrained(config.model, num_labels=2, pad_token_id=0).eval()
        assert torch.equal(lk.attach(again, lk.Adapter.load(result.adapter))(input_ids=ids).logits, first)
