"""Loading a base: what a name may be, which precision is chosen and why, and errors for folders that are not models."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import torch

from lorakit.bases import load
from lorakit.bases.device import choose_device, choose_dtype
from lorakit.bases.load import load_config, load_model, load_tokenizer, model_path
from lorakit.errors import ConfigError, LorakitError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("models") / "tiny-model")


def test_the_embedded_model_is_a_folder_of_the_package():
    path = load.embedded_folder()
    assert model_path("embedded") == str(path)
    assert (path / "config.json").is_file()
    assert (path / "model.safetensors").is_file()


def test_the_embedded_model_loads_with_its_tokenizer():
    model = load_model("embedded", torch.float32, CPU)
    tokenizer = load_tokenizer("embedded")
    assert not model.training
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.eos_token_id is not None
    assert tokenizer.decode(tokenizer("name[Blue Spice]\n").input_ids) == "name[Blue Spice]\n"


def test_a_folder_is_a_local_model_and_another_name_a_hub_id(folder):
    assert model_path(str(folder)) == str(folder)
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert model_path(name) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loads_in_the_requested_precision_and_eval_mode(folder, dtype):
    model = load_model(str(folder), dtype, CPU)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    expected = tiny_lm.llama().to(dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name, message",
    [
        ("{models}/tiny-mode", r"there is no model folder '.*tiny-mode'; did you mean 'tiny-model'\?"),
        ("{models}/nowhere/at/all", "there is no model folder"),
        ("./nowhere", "there is no model folder"),
        ("{models}/file.txt", "is a file; expected a model folder"),
        ("{models}/empty", "config.json is missing"),
        ("{models}/adapter", "it is an adapter .*: give its base as the model"),
    ],
)
def test_a_path_that_is_not_a_model_folder_is_explained(tmp_path, name, message):
    for subfolder in ("tiny-model", "empty", "adapter"):
        (tmp_path / subfolder).mkdir()
    (tmp_path / "tiny-model" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(LorakitError, match=message):
        load_tokenizer(name.format(models=tmp_path))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda f: (f / "config.json").write_text("{"),
        lambda f: (f / "config.json").write_text("{}"),
        lambda f: (f / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"})),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100),
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
    ],
    ids=["config cut off", "config empty", "unknown architecture", "no weights", "weights damaged", "weights cut off"],
)
def test_a_damaged_model_folder_is_an_error_that_names_it(tmp_path, break_it):
    folder = tiny_lm.save(tmp_path / "m")
    break_it(folder)
    with pytest.raises(LorakitError) as error:
        load_model(str(folder), torch.float32, CPU)
    assert f"cannot load '{folder}'" in str(error.value)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_a_damaged_tokenizer_is_an_error_that_names_its_folder(tmp_path, name, text):
    folder = tiny_lm.save(tmp_path / "m")
    (folder / name).write_text(text)
    with pytest.raises(LorakitError) as error:
        load_tokenizer(str(folder))
    assert str(error.value).startswith(f"cannot load '{folder}' with AutoTokenizer: ")


def test_a_missing_tokenizer_is_an_error_not_an_empty_one(tmp_path):
    folder = tiny_lm.save(tmp_path / "m", tiny_lm.gpt2())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(LorakitError, match="has no tokenizer"):
        load_tokenizer(str(folder))
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    with pytest.raises(LorakitError, match="cannot load"):  # the reason differs between transformers releases
        load_tokenizer(str(folder))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(str(folder))("ab").input_ids == [0, 1]
    (folder / "vocab.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert len(load_tokenizer(str(folder))) > 256, "a byte tokenizer needs no vocabulary files"


def test_weights_that_do_not_fit_the_config_are_an_error(tmp_path):
    """transformers would initialise missing weights at random, and training would start from noise."""
    folder = tiny_lm.save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(LorakitError, match=r"lacks weights .*model\.layers\.2\."):
        load_model(str(folder), torch.float32, CPU)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(LorakitError, match="cannot load"):
        load_model(str(folder), torch.float32, CPU)


def test_tied_weights_stored_once_are_not_missing(tmp_path):
    folder = tiny_lm.save(tmp_path / "m", tiny_lm.llama(tied=True))
    model = load_model(str(folder), torch.float32, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_model(str(tiny_lm.save(tmp_path / "g", tiny_lm.gpt2())), torch.float32, CPU).config.model_type == "gpt2"


def test_the_config_loads_on_its_own(folder, tmp_path):
    assert load_config(str(folder)).hidden_size == 32
    with pytest.raises(LorakitError):
        load_config(str(tmp_path))


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_given_precision_is_used(name, dtype):
    assert (choose_dtype(name, CPU).value, choose_dtype(name, CPU).reason) == (dtype, "as given")


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_chosen_where_the_hardware_multiplies_it(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    for device in ("cpu", "cuda"):
        choice = choose_dtype("auto", torch.device(device))
        assert choice.value == dtype
        assert "bf16" in choice.reason


def test_an_unknown_precision_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown precision 'fp23'; did you mean 'fp32'"):
        choose_dtype("fp23", CPU)


def test_a_device_is_chosen_with_a_reason():
    choice = choose_device()
    assert isinstance(choice.value, torch.device)
    assert choice.reason
