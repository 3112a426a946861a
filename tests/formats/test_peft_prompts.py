"""PEFT's folders of virtual tokens, both ways, with the real PEFT as the judge; LoRA beside them; damaged files."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.errors import AdapterError, LorakitWarning
from lorakit.formats import losses
from lorakit.formats.peft import CONFIG, WEIGHTS
from lorakit.formats.peft_prompts import ENCODER, FOLDER

N = 4
ROWS = torch.randint(3, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
CASES = {
    "prefix": ({"variant": "prefix"}, lambda **o: peft.PrefixTuningConfig(**o)),
    "prefix by an mlp": (
        {"variant": "prefix", "prompt_encoder": "mlp", "encoder_size": 6},
        lambda **o: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=6, **o),
    ),
    "prompt": ({"variant": "prompt"}, lambda **o: peft.PromptTuningConfig(**o)),
    "p-tuning by an mlp": (
        {"variant": "p_tuning", "encoder_size": 6},
        lambda **o: peft.PromptEncoderConfig(encoder_hidden_size=6, **o),
    ),
    "p-tuning by an lstm": (
        {"variant": "p_tuning", "prompt_encoder": "lstm", "encoder_size": 6, "encoder_layers": 1},
        lambda **o: peft.PromptEncoderConfig(
            encoder_hidden_size=6, encoder_num_layers=1, encoder_reparameterization_type="LSTM", **o
        ),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def of_tokens(logits):
    return logits[:, -ROWS.shape[1] :]


def loaded(make, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_ours_has_the_same_logits_in_peft(case, make, tmp_path):
    model = lk.attach(make(), lk.LoraConfig(virtual_tokens=N, task="CAUSAL_LM", **case[0]))
    lk.capture(model).save(tmp_path / "a")
    again = lk.attach(make(), lk.Adapter.load(tmp_path / "a"))
    wanted = again(input_ids=ROWS).logits
    torch.testing.assert_close(wanted, model(input_ids=ROWS).logits, atol=1e-7, rtol=0)
    assert torch.equal(of_tokens(loaded(make, tmp_path / "a")(input_ids=ROWS).logits), wanted)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), case[1](task_type="CAUSAL_LM", num_virtual_tokens=N))
        theirs.save_pretrained(tmp_path / "theirs")
    known = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert {name: fields[name] for name in fields.keys() & known.keys()} == {
        name: known[name] for name in fields.keys() & known.keys()
    }
    assert fields.keys() <= known.keys()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_pefts_has_the_same_logits_here(case, make, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), case[1](task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
        theirs.save_pretrained(tmp_path)
    adapter = lk.Adapter.load(tmp_path)
    model = lk.attach(make(), adapter)
    torch.testing.assert_close(
        model(input_ids=ROWS).logits, of_tokens(theirs(input_ids=ROWS).logits), atol=1e-6, rtol=0
    )
    assert adapter.config.variant == case[0]["variant"]
    assert losses(adapter, "peft") == []
    # without an encoder in PEFT's file, the tokens themselves are trained
    trained = lk.attach(make(), adapter, trainable=True)
    assert [n.rsplit(".", 1)[1] for n, p in trained.named_parameters() if p.requires_grad] == ["embeddings"]


def test_training_goes_on_from_our_files_with_the_encoder_and_from_pefts_two_files_without(case, tmp_path):
    model = lk.attach(tiny.llama(), lk.LoraConfig(virtual_tokens=N, **case[0]))
    value = lk.capture(model)
    value.save(tmp_path)
    again = lk.attach(tiny.llama(), lk.Adapter.load(tmp_path), trainable=True)
    own, back = model.model.lora_default, again.model.lora_default
    assert [n for n, _ in own.named_parameters()] == [n for n, _ in back.named_parameters()]
    for each in (model, again):
        each(input_ids=ROWS, labels=ROWS).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(own.parameters(), back.parameters(), strict=True))
    if not (tmp_path / ENCODER).exists():
        assert own.encoder is None
        return
    (tmp_path / ENCODER).unlink()
    with pytest.warns(LorakitWarning, match="without the encoder"):
        alone = lk.Adapter.load(tmp_path)
    assert alone.updates["base_model"].encoder == {}


def test_a_classifiers_head_is_saved_under_pefts_names_and_pools_alike(tmp_path):
    model = lk.attach(tiny.bert(), lk.LoraConfig(variant="prompt", virtual_tokens=N, task="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(0.1)
    lk.capture(model).save(tmp_path)
    assert {"base_model.classifier.weight", "base_model.classifier.bias"} < load_file(tmp_path / WEIGHTS).keys()
    wanted = model(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits
    theirs = loaded(tiny.bert, tmp_path)
    found = theirs(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    again = lk.attach(tiny.bert(), lk.Adapter.load(tmp_path))
    torch.testing.assert_close(again(input_ids=ROWS).logits, wanted, atol=1e-6, rtol=0)


def test_pefts_prompts_of_an_encoder_whose_head_reads_the_first_position_are_refused(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = RobertaForSequenceClassification(RobertaConfig(**sizes, intermediate_size=24, pad_token_id=1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="reads the first of these"):
        lk.attach(base, lk.Adapter.load(tmp_path))
    lk.attach(base, lk.Adapter.load(tmp_path), force=True)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning"])
def test_lora_with_virtual_tokens_is_two_folders_that_peft_reads_apart(kind, tmp_path):
    config = lk.LoraConfig(rank=2, targets=["q_proj"], prompt=kind, virtual_tokens=N, save_modules=["lm_head"])
    model = lk.attach(tiny.llama(), config)
    tiny.randomise_factors(model)
    both = lk.capture(model)
    with pytest.warns(LorakitWarning, match=f"PEFT loads the LoRA alone, or the virtual tokens alone .{FOLDER}/"):
        both.save(tmp_path)
    assert losses(both, "peft") == []
    back = lk.Adapter.load(tmp_path)
    assert back.digest() == both.digest()
    assert (back.config.prompt, back.config.virtual_tokens, back.config.variant) == (kind, N, "lora")
    assert FOLDER not in str(back.metadata.keys())
    wanted = model(input_ids=ROWS).logits
    again = lk.attach(tiny.llama(), back)
    torch.testing.assert_close(again(input_ids=ROWS).logits, wanted, atol=1e-6, rtol=0)
    for part, folder in ((both.prune(["base_model"]), tmp_path), (both.select(["base_model"]), tmp_path / FOLDER)):
        alone = lk.attach(tiny.llama(), part)
        theirs = loaded(tiny.llama, folder)
        torch.testing.assert_close(
            of_tokens(theirs(input_ids=ROWS).logits), alone(input_ids=ROWS).logits, atol=1e-5, rtol=0
        )
    # an adapter without virtual tokens, saved there after it, leaves none behind
    both.prune(["base_model"]).save(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    assert list(lk.Adapter.load(tmp_path).updates) == [m for m in both.updates if m != "base_model"]


def test_a_missing_folder_of_virtual_tokens_is_an_error(tmp_path):
    import shutil

    model = lk.attach(tiny.llama(), lk.LoraConfig(rank=2, targets=["q_proj"], prompt="prompt", virtual_tokens=N))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.capture(model).save(tmp_path)
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.raises(AdapterError, match=f"'{FOLDER}' with them is not there"):
        lk.Adapter.load(tmp_path)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"num_virtual_tokens": 3}, r"is \[4, 32\]; expected \[3"),
        ({"num_virtual_tokens": None}, "virtual_tokens"),
        ({"num_layers": 3}, "num_layers 3"),
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"token_dim": "8"}, "token_dim 8"),
        ({"num_transformer_submodules": 2}, "encoder-decoder"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_an_error(fields, match, tmp_path):
    lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(variant="prefix", virtual_tokens=N))).save(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(AdapterError, match=match):
        lk.Adapter.load(tmp_path)


def test_foreign_and_missing_keys_and_values_that_are_not_finite_are_errors(tmp_path):
    lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(variant="prompt", virtual_tokens=N))).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for changed, match in (
        ({}, "'prompt_embeddings' is missing"),
        ({**tensors, "base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)}, "does not belong"),
        ({"prompt_embeddings": torch.full((N, 16), float("nan"))}, "not finite"),
    ):
        save_file(changed or {"other": torch.ones(1)}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=match):
            lk.Adapter.load(tmp_path)


def test_an_encoder_of_another_kind_is_an_error_when_training_goes_on(tmp_path):
    model = lk.attach(tiny.llama(), lk.LoraConfig(variant="p_tuning", virtual_tokens=N))
    lk.capture(model).save(tmp_path)
    save_file({"embedding.weight": torch.ones(N, 16)}, tmp_path / ENCODER)
    adapter = lk.Adapter.load(tmp_path)
    lk.attach(tiny.llama(), adapter)
    with pytest.raises(AdapterError, match="encoder of the virtual tokens"):
        lk.attach(tiny.llama(), adapter, trainable=True)


def test_formats_of_other_programs_refuse_them():
    value = lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(variant="prompt", virtual_tokens=N)))
    for name in ("gguf", "mlx", "loralib"):
        assert any("virtual tokens" in line for line in losses(value, name)), name
