"""New tokens, from the data to the answer: added, trained alone, saved with their tokenizer, known to every verb."""

from __future__ import annotations

import json

import peft
import pytest
import tiny_lm
import torch
import transformers

import lorakit as lk
from lorakit.adapter.tokens import Tokens
from lorakit.cli import run
from lorakit.cli.shared.loading import load
from lorakit.errors import ConfigError
from lorakit.train.config import TrainConfig
from lorakit.train.memory import planner_for
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
NEW = ["<A>", "<end of thought>"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"<A>{n}: ", "completion": f"{n}<end of thought>{n}"} for n in tiny_lm.NAMES * 2]
    return tiny_lm.write_rows(tmp_path_factory.mktemp("tokens") / "tokens.jsonl", rows)


@pytest.fixture(params=["untied", "tied"])
def base(request, tmp_path):
    return tiny_lm.save(tmp_path / "base", tiny_lm.llama(tied=request.param == "tied"))


@pytest.fixture
def make(make_config, base, data, tmp_path):
    def build(**changes):
        values = {"model": base, "data": data, "add_tokens": NEW, "learning_rate": 3e-2, "steps": 6}
        return make_config(**values | {"validation": 0, "sample_tokens": 0, "out": tmp_path / "run"} | changes)

    return build


def test_only_the_new_rows_are_trained_and_tied_weights_stay_tied(make):
    job = set_up(make())
    model = job.model
    assert model.get_input_embeddings().weight.shape[0] == 260
    assert model.config.vocab_size == 260
    assert [item.ids.count(258) for item in job.train] == [1] * len(job.train)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows = {n: p.shape for n, p in model.named_parameters() if p.requires_grad and ("embed" in n or "head" in n)}
    assert set(rows.values()) == {(2, 32)}
    assert len(rows) == (1 if tied else 2)
    assert tied == model.config.tie_word_embeddings
    before = model.get_input_embeddings().weight.detach().clone()
    torch.testing.assert_close(before[258:], before[:258].mean(0).expand(2, -1))
    train(job.config, QUIET)


def test_the_result_loads_in_peft_with_the_tokenizer_beside_it(make, base):
    config = make()
    result = train(config, QUIET)
    losses = [row["loss"] for row in RunFolder(config.out).rows()]
    assert losses[-1] < losses[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.adapter)
    assert tokenizer.convert_tokens_to_ids(NEW) == [258, 259]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # random rows, which PEFT replaces
    theirs = peft.PeftModel.from_pretrained(theirs, result.adapter).eval()
    loaded = load(str(base), [str(result.adapter)], "fp32")
    assert loaded.tokenizer("<A>").input_ids == [258]
    ids = torch.tensor([[258, 10, 20, 259, 30]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    record = json.loads((result.adapter / "lorakit.json").read_text())
    assert record["added_tokens"] == {"<A>": 258, "<end of thought>": 259}
    assert (result.adapter / "adapter_model.safetensors").stat().st_size < 60_000  # rows, not an embedding


def test_eval_and_generate_know_the_tokens(make, base, data):
    result = train(make(), QUIET)
    flags = ["--model", str(base), "--adapter", str(result.adapter), "--precision", "fp32"]
    assert run(["eval", str(data), *flags, "--limit", "4", "--no-text", "--json"]) == 0
    assert run(["generate", "<A>Ada: ", *flags, "--max-new-tokens", "3"]) == 0


def test_a_run_goes_on_from_them_and_resumes(make, data, tmp_path):
    first = train(make(), QUIET)
    again = train(make(steps=8), QUIET)  # longer: resumed
    assert again.step == 8
    config = TrainConfig(
        data=str(data),
        adapter=str(first.adapter),
        out=str(tmp_path / "next"),
        steps=2,
        threads=1,
        precision="fp32",
        validation=0,
        sample_tokens=0,
    )
    second = train(config, QUIET)
    adapter = lk.Adapter.load(second.adapter)
    assert {u.ids for u in adapter.updates.values() if isinstance(u, Tokens)} == {(258, 259)}
    assert train(config, QUIET).step == 2  # ended already: the settings are the same


def test_the_plan_counts_the_rows(make):
    from lorakit.tasks.text.token_ids import with_token_ids

    config = make()
    job = set_up(config)
    planned = planner_for(with_token_ids(config, job.base.processor), torch.float32, torch.device("cpu")).estimate(
        1, 16
    )
    assert planned.trained == sum(p.numel() for p in job.model.parameters() if p.requires_grad)


def test_tokens_come_from_a_file_or_by_name(make, tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text("\n".join(NEW) + "\n", encoding="utf8")
    job = set_up(make(add_tokens=[str(file)], trainable_tokens=["</s>", 7]))
    assert job.config.add_tokens == NEW
    assert job.config.trainable_tokens["input_embeddings"] == [1, 7, 258, 259]
    assert job.config.trainable_tokens["output_embeddings"] == [258, 259]


def test_a_row_with_a_token_beyond_the_embedding_is_an_error_with_what_to_do(make_config, data, tmp_path, capsys):
    """A tokenizer with added tokens, saved beside an unchanged model."""
    base = tiny_lm.save(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(base)
    config = make_config(model=base, data=data)
    for task in ("causal_lm",):
        with pytest.raises(
            ConfigError, match=r"tokens\.jsonl, row 1: its token '<A>' has the id 258, .* 258 rows"
        ) as error:
            train(config.replace(task=task), QUIET)
    assert "--add-tokens <A>, <end of thought>" in str(error.value)
    assert not RunFolder(config.out).path.exists()
    assert run(["eval", str(data), "--model", str(base), "--no-text"]) == 1
    assert "the model's embedding has 258 rows" in capsys.readouterr().err
    assert train(config.replace(add_tokens=NEW, steps=2), QUIET).step == 2


@pytest.mark.parametrize(
    "given, said",
    [
        ({"add_tokens": ["a"]}, "add_tokens: 'a' is a token of .* already"),
        ({"add_tokens": ["<A>", "<A>"]}, "'<A>' is named twice"),
        ({"add_tokens": [], "trainable_tokens": ["<B>"]}, "the tokenizer has no token '<B>'"),
    ],
)
def test_wrong_tokens_are_named(make, given, said):
    with pytest.raises(ConfigError, match=said):
        train(make(**given), QUIET)


def test_an_adapter_without_room_for_its_tokens_says_how_to_make_room(make, base):
    result = train(make(steps=2), QUIET)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(lk.errors.AdapterError, match=r"resize_token_embeddings\(260\)"):
        lk.attach(model, lk.Adapter.load(result.adapter), force=True)


def test_flags_take_tokens_and_ids(make, base, data, tmp_path):
    flags = ["train", "--data", str(data), "--model", str(base), "--out", str(tmp_path / "flags"), *tiny_lm.FLAGS]
    assert run([*flags, "--add-tokens", ",".join(NEW), "--trainable-tokens", "5,</s>"]) == 0
    adapter = lk.Adapter.load(tmp_path / "flags")
    assert adapter.updates["model.embed_tokens"].ids == (1, 5, 258, 259)
