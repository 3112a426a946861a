"""`adapter_trainer`: a Trainer's checkpoints hold the adapter, and a run resumes from them bit for bit."""

from __future__ import annotations

import copy
import json
import re

import hub_stub
import huggingface_hub
import pytest
import quantized
import tiny
import tiny_lm
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import lorakit as lk
from lorakit.bases.load import load_base
from lorakit.errors import AdapterError, LorakitWarning, StateError
from lorakit.integrations import adapter_trainer, quantized_base

CONFIG = lk.LoraConfig(rank=4, dropout=0.2)
WEIGHTS = "adapter_model.safetensors"


def rows(count: int = 16, label: bool = False, seed: int = 3) -> Dataset:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (count, 6), generator=made).tolist()
    return Dataset.from_list([{"input_ids": i, "labels": i[0] % 3 if label else i} for i in ids])


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **settings | changes)


def adapted(config: lk.LoraConfig = CONFIG, make=tiny.llama):
    torch.manual_seed(11)
    return lk.attach(make(), config)


def trainer_of(model, folder, data=None, **changes) -> Trainer:
    return adapter_trainer(Trainer(model, arguments(folder, **changes), train_dataset=data or rows()))


def same(a: lk.Adapter, b: lk.Adapter) -> bool:
    return a.digest() == b.digest()


@pytest.mark.parametrize(
    "config, make",
    {
        "lora with dropout": (CONFIG, tiny.llama),
        "head and norm": (
            lk.LoraConfig(rank=2, dropout=0.2, targets=["q_proj"], save_modules=["lm_head", "norm"]),
            tiny.llama,
        ),
        "tied embedding": (
            lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["embed_tokens"]),
            lambda: tiny.llama(tied=True),
        ),
        "tokens": (lk.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=[4, 7]), tiny.llama),
        "pissa": (lk.LoraConfig(rank=2, init="pissa"), tiny.llama),
        "dora": (lk.LoraConfig(rank=2, variant="dora"), tiny.llama),
        "vera": (lk.LoraConfig(rank=4, variant="vera"), tiny.llama),
        "prefix": (lk.LoraConfig(variant="prefix", virtual_tokens=3, prompt_encoder="mlp"), tiny.llama),
        "lora with a prompt": (lk.LoraConfig(rank=2, prompt="prompt", virtual_tokens=3), tiny.llama),
        "biases, classifier": (lk.LoraConfig(targets="none", bias="all", task="SEQ_CLS"), tiny.bert),
    }.values(),
    ids=lambda v: (
        None if callable(v) else f"{v.variant}-{v.init}-{v.bias}-{v.save_modules}-{v.trainable_tokens}-{v.prompt}"
    ),
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(config, make, tmp_path):
    data = rows(label=config.task is not None)
    whole = trainer_of(adapted(config, make), tmp_path / "a", data)
    whole.train()
    plain, trained = tiny.bits(make()), lk.capture(whole.model)
    assert not same(trained, lk.capture(adapted(config, make)))
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert not list(checkpoint.glob("model*"))
    again = trainer_of(adapted(config, make), tmp_path / "b", data)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(lk.capture(again.model), trained)
    assert [row["loss"] for row in again.state.log_history if row.get("step") in (4, 5, 6) and "loss" in row] == [
        row["loss"] for row in whole.state.log_history if row.get("step") in (4, 5, 6) and "loss" in row
    ]
    assert tiny.same_bits(tiny.bits(again.model), plain)
    # In a model of its own, and from the final save.
    whole.save_model(tmp_path / "final")
    fresh = lk.attach(make(), lk.Adapter.load(tmp_path / "final"))
    torch.testing.assert_close(tiny.logits(fresh), tiny.logits(whole.model.eval()), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_as_large_as_the_factors(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=128, intermediate_size=256, num_hidden_layers=2))
    lk.attach(model, lk.LoraConfig(rank=8))
    trainer = trainer_of(model, tmp_path, max_steps=1, save_steps=1)
    trainer.processing_class = tiny_lm.tokenizer()
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    factors = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = sum((folder / name).stat().st_size for name in (WEIGHTS, "adapter_config.json", "lorakit.json"))
    assert held <= 1.1 * factors
    assert {file.name for file in folder.iterdir()} >= {"tokenizer.json", "training_args.bin", "trainer_state.json"}
    assert not list(folder.glob("*state.safetensors"))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("x").input_ids == trainer.processing_class("x").input_ids


def test_the_best_checkpoint_is_put_back_and_the_limit_holds(tmp_path):
    model = adapted()
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_steps": 8,
    }
    trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=rows(4), eval_dataset=rows(8, seed=4))
    adapter_trainer(trainer).train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_the_trained_adapter_is_saved_and_a_frozen_one_is_left(tmp_path):
    frozen = lk.capture(tiny.randomise_factors(lk.attach(tiny.llama(), lk.LoraConfig(rank=2)), seed=8))
    model = lk.attach(tiny.llama(), frozen, "sft")
    lk.attach(model, CONFIG, "new")
    lk.activate(model, {"sft": 1, "new": 1})
    trainer = trainer_of(model, tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    saved = lk.Adapter.load(tmp_path / "checkpoint-2")
    assert same(saved, lk.capture(model, "new"))
    assert same(lk.capture(model, "sft"), frozen)


def test_checkpoints_from_before_adapter_trainer_can_be_resumed_from(tmp_path):
    plain = Trainer(adapted(), arguments(tmp_path / "a"), train_dataset=rows())
    plain.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert (checkpoint / "model.safetensors").exists()
    again = trainer_of(adapted(), tmp_path / "b")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(lk.capture(again.model), lk.capture(plain.model))


def test_a_trainers_own_checkpoint_loads_with_the_adapter(tmp_path):
    trainer = Trainer(adapted(), arguments(tmp_path, learning_rate=0.3), train_dataset=rows())
    trainer.train()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    trained = tiny.logits(trainer.model.eval())
    torch.testing.assert_close(tiny.logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, tiny.logits(tiny.llama()), atol=1e-3)


def test_push_to_hub_uploads_the_adapter(tmp_path, monkeypatch):
    with hub_stub.serve(monkeypatch, tmp_path) as hub:
        monkeypatch.setattr("transformers.utils.hub._hf_api", huggingface_hub.HfApi(hub.url))
        settings = {
            "push_to_hub": True,
            "hub_model_id": "someone/tuned",
            "hub_token": hub_stub.TOKEN,
            "hub_strategy": "checkpoint",
            "hub_always_push": True,
        }
        trainer = trainer_of(adapted(), tmp_path / "out", max_steps=2, save_steps=1, **settings)
        trainer.processing_class = tiny_lm.tokenizer()
        trainer.train()
        trainer.push_to_hub()
        files = hub.files("someone/tuned")
        expected = lk.capture(trainer.model)
        assert {WEIGHTS, "adapter_config.json", "lorakit.json", "README.md", "tokenizer.json"} <= set(files)
        assert f"last-checkpoint/{WEIGHTS}" in files
        assert not any(name.endswith("model.safetensors") and WEIGHTS not in name for name in files)
        assert same(lk.Adapter.load("someone/tuned"), expected)


def test_lora_plus_gets_its_second_learning_rate(tmp_path):
    config = lk.LoraConfig(rank=2, lora_plus=16)
    changes = {"weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_of(adapted(config), tmp_path / "a", **changes)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups if group["params"]] == [1e-2, 16e-2]
    own = adapted(config)
    optimizer = torch.optim.AdamW(lk.parameter_groups(own, 1e-2), weight_decay=0.0, fused=True)
    given = Trainer(own, arguments(tmp_path / "b", **changes), train_dataset=rows(), optimizers=(optimizer, None))
    adapter_trainer(given).train()
    assert same(lk.capture(own), lk.capture(trainer.model))
    again = trainer_of(adapted(config), tmp_path / "c", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(lk.capture(again.model), lk.capture(trainer.model))


def test_an_adapter_of_a_quantized_base_is_trained(tmp_path):
    model = load_base(quantized.save(tmp_path)[0], quantize="nf4", dtype="fp32")
    lk.attach(model, lk.LoraConfig(rank=2))
    before = lk.capture(model)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path / "out"), train_dataset=rows())
    with quantized_base(model):
        trainer = Trainer(model, arguments(tmp_path / "out", max_steps=1, save_steps=1), train_dataset=rows())
    adapter_trainer(trainer).train()
    assert not same(lk.Adapter.load(tmp_path / "out" / "checkpoint-1"), before)
    assert not model._hf_peft_config_loaded


def test_an_adapter_that_is_not_trained_is_refused(tiny_llama, tmp_path):
    value = lk.capture(adapted())
    with pytest.raises(StateError, match="no adapter is attached"):
        trainer_of(tiny_llama, tmp_path)
    lk.attach(tiny_llama, value, "sft")
    with pytest.raises(StateError, match=r"no attached adapter is trained.*\n.*'sft', trainable=True"):
        trainer_of(tiny_llama, tmp_path)
    lk.attach(tiny_llama, CONFIG, "new")
    lk.attach(tiny_llama, CONFIG, "newer")
    with pytest.raises(StateError, match=r"2 attached adapters are trained \(new, newer\)"):
        trainer_of(tiny_llama, tmp_path)
    lk.detach(tiny_llama, "newer")
    with pytest.raises(StateError, match=r"'new' is to be trained, and is not active.*\n.*activate\(model, 'new'\)"):
        trainer_of(tiny_llama, tmp_path)
    lk.activate(tiny_llama, "new")
    tiny_llama.lm_head.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"lm_head.weight would be trained too"):
        trainer_of(tiny_llama, tmp_path)
    tiny_llama.requires_grad_(False)
    with pytest.raises(StateError, match=r"every parameter of adapter 'new' has been frozen"):
        trainer_of(tiny_llama, tmp_path)


def test_what_a_trainer_would_do_wrong_is_refused(tiny_llama, tmp_path):
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=rows())
    for attribute, name in {"is_fsdp_enabled": "FSDP", "is_deepspeed_enabled": "DeepSpeed"}.items():
        setattr(trainer, attribute, True)
        with pytest.raises(StateError, match=f"the trainer uses {name}: its processes hold parts"):
            adapter_trainer(trainer)
        setattr(trainer, attribute, False)
    with pytest.raises(StateError, match="adjusts its ranks after each step"):
        trainer_of(adapted(lk.LoraConfig(rank=2, variant="adalora")), tmp_path)
    with pytest.raises(StateError, match=r"PEFT's format, which checkpoints have, cannot hold all of 'default'"):
        trainer_of(adapted(lk.LoraConfig(rank=2, variant="loha", bias="all"), tiny.bert), tmp_path)
    with pytest.raises(StateError, match=r"got a torch.nn.modules.linear.Linear"):
        adapter_trainer(torch.nn.Linear(1, 1))
    lk.merge(trainer.model)
    with pytest.raises(StateError, match="'default' is merged"):
        adapter_trainer(trainer)
    assert type(trainer) is Trainer
    done = trainer_of(adapted(), tmp_path)
    assert adapter_trainer(done) is done
    assert type(done).__name__ == "Trainer"


def test_an_adapted_output_layer_under_trls_fused_one_is_refused(tmp_path):
    pytest.importorskip(
        "trl", minversion="1.16", reason="written for TRL 1.16, whose modules have moved since older releases"
    )
    from trl.trainer.utils import add_fused_lm_head

    for targets, tokens in ((["lm_head"], []), (["q_proj"], [4])):
        config = lk.LoraConfig(rank=2, targets=targets, trainable_tokens=tokens)
        model = adapted(config, lambda tokens=tokens: tiny.llama(tied=bool(tokens)))
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows())
        add_fused_lm_head(model)
        with pytest.raises(StateError, match=r"the output layer \(Linear\) has an update"):
            adapter_trainer(trainer)
    saved = adapted(lk.LoraConfig(rank=2, targets=["q_proj"], save_modules=["lm_head"]))
    trainer = Trainer(saved, arguments(tmp_path), train_dataset=rows())
    add_fused_lm_head(saved)
    adapter_trainer(trainer)


def test_a_second_model_as_reference_gives_a_warning_and_ours_none(tmp_path, recwarn):
    model = adapted()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows())
    trainer.ref_model = copy.deepcopy(tiny.llama())
    with pytest.warns(LorakitWarning, match=r"a second model of [\d,]+ parameters"):
        adapter_trainer(trainer)
    recwarn.clear()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows())
    trainer.ref_model = lk.integrations.reference(model)
    adapter_trainer(trainer)
    assert not [w for w in recwarn if issubclass(w.category, LorakitWarning)]


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    trainer = trainer_of(adapted(), tmp_path / "a", max_steps=1, save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "a" / "checkpoint-1"
    others = {
        r"only the checkpoint has 'model.layers.0.mlp": lk.LoraConfig(rank=4, targets=["q_proj"]),
        r"is \[4, 16\] there, \[8, 16\] here": lk.LoraConfig(rank=8, alpha=2 * CONFIG.alpha),
        r"the scale \(alpha / rank\) of 'model.layers.0.self_attn": CONFIG.replace(alpha=3.0),
    }
    for message, config in others.items():
        model = adapted(config)
        before = lk.capture(model)
        with pytest.raises(AdapterError, match=message):
            trainer_of(model, tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))
        assert same(lk.capture(model), before)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"holds no adapter \(no adapter_config.json\)"):
        trainer_of(adapted(), tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "empty"))
    other = adapted(CONFIG, lambda: tiny.llama(dtype=torch.float32).apply(_perturbed))
    with pytest.raises(AdapterError, match="trained on another base"):
        trainer_of(other, tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))


def _perturbed(module):
    if isinstance(module, torch.nn.Linear):
        with torch.no_grad():
            module.weight.add_(1.0)


def test_a_model_with_peft_around_it_is_refused_with_the_fix(tmp_path):
    import peft

    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(StateError, match=re.escape("give the trainer no peft_config")):
        trainer_of(model, tmp_path)


def test_what_is_written_is_pefts_folder(tmp_path):
    import peft

    trainer = trainer_of(adapted(), tmp_path, max_steps=2, save_steps=2, learning_rate=0.3)
    trainer.train()
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-2").eval()
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(trainer.model.eval()), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())["peft_type"] == "LORA"
