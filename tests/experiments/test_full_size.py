"""The folders for the paper's own sizes: every config is valid, and trains tiny models of the same classes."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import torch
import yaml

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.experiments import full
from lorakit.experiments.full import gpt2_e2e, gpt3_shapes, roberta_glue
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.train import train

STEPS = {"steps": 2, "threads": 1, "precision": "fp32", "memory": "unchecked", "sample_tokens": 0, "max_length": 64}


@pytest.mark.parametrize("name", full.NAMES)
def test_every_config_is_valid_and_files_are_written_once(name, tmp_path):
    folder = full.write(name, tmp_path / name)
    assert full.write(name, folder) == folder  # the same files again
    configs = sorted(folder.glob("*.yaml"))
    assert configs
    for path in configs:
        TrainConfig(**yaml.safe_load(path.read_text()), data="-")
        assert path.name in (folder / "run.sh").read_text() or "$size-$1.yaml" in (folder / "run.sh").read_text()
    configs[0].write_text("rank: 3\n")
    with pytest.raises(ConfigError, match="another content"):
        full.write(name, folder)
    assert configs[0].read_text() == "rank: 3\n"


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'gpt2-e2e'"):
        full.files("gpt2-e2")


def test_warmup_is_the_papers_number_of_steps():
    assert round(gpt2_e2e.config()["warmup"] * gpt2_e2e.STEPS) == gpt2_e2e.WARMUP_STEPS


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A tiny RoBERTa without a classifier, with the byte tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = RobertaConfig(
        vocab_size=len(tiny_lm.tokenizer()), max_position_embeddings=100, pad_token_id=tiny_lm.PAD, **sizes
    )
    folder = tmp_path_factory.mktemp("roberta")
    RobertaModel(config).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return folder


GLUE = {
    "mnli": "index\tsentence1\tsentence2\tgold_label\n"
    + "0\tA cat sits.\tAn animal.\tneutral\n1\tA dog.\tA cat.\tcontradiction\n" * 6,
    "cola": "gj04\t1\t\tShe left.\ngj04\t0\t*\tLeft she the.\n" * 6,
    "stsb": "index\tsentence1\tsentence2\tscore\n" + "0\tA cat.\tA dog.\t1.5\n1\tA cat.\tThe cat.\t4.25\n" * 6,
}


@pytest.mark.parametrize("task", GLUE)
def test_a_tiny_roberta_trains_with_the_config_on_glues_form(task, roberta, tmp_path):
    (tmp_path / "train.tsv").write_text(GLUE[task])
    settings = roberta_glue.config(task, "base") | STEPS
    config = TrainConfig(**settings, model=str(roberta), data=str(tmp_path / "train.tsv"), out=str(tmp_path / "run"))
    result = train(config, Progress(quiet=True))
    adapter = lk.Adapter.load(result.adapter)
    assert {name.rsplit(".", 1)[-1] for name in adapter.updates} == {"query", "value"}
    assert len(adapter.updates) == 4
    assert all(update.rank == 8 for update in adapter.updates.values())


def test_a_tiny_gpt2_trains_query_and_value_with_the_config(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96}
    base = GPT2Config(
        vocab_size=len(tiny_lm.tokenizer()), bos_token_id=1, eos_token_id=1, pad_token_id=tiny_lm.PAD, **sizes
    )
    GPT2LMHeadModel(base).save_pretrained(tmp_path / "gpt2")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "gpt2")
    rows = [f'"name[Zizzi {i}], area[riverside]",Zizzi {i} is there.' for i in range(8)]
    (tmp_path / "train.csv").write_text("\n".join(["mr,ref", *rows]))
    settings = gpt2_e2e.config() | STEPS
    files = {"model": str(tmp_path / "gpt2"), "data": str(tmp_path / "train.csv"), "out": str(tmp_path / "run")}
    result = train(TrainConfig(**settings, **files), Progress(quiet=True))
    assert result.step == 2
    recipe = json.loads((result.adapter / "lorakit.json").read_text())["recipe"]
    assert recipe["packed"] == {"c_attn": [True, False, True]}


def test_gpt3s_shape_is_gpt3s():
    from transformers import GPT2Config

    shape = GPT2Config(**{k: v for k, v in gpt3_shapes.shape().items() if k != "architectures"})
    assert (shape.n_layer, shape.n_embd, shape.n_head, shape.n_positions) == (96, 12288, 96, 2048)
