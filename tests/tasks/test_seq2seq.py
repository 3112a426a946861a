"""Sequence to sequence: the loss is transformers' own, adapters reach both halves; other bases are refused by the
name of their task.
"""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_lm
import tiny_seq
import torch

import lorakit as lk
from lorakit.bases.load import load_tokenizer
from lorakit.cli import run
from lorakit.data.pairs import read_pairs
from lorakit.data.read import read_rows
from lorakit.errors import ConfigError, NotFiniteError, TrainError
from lorakit.generate.generate import generate
from lorakit.tasks import task_of
from lorakit.tasks.task import Base
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
SEQ2SEQ = task_of("seq2seq")
MODELS = {
    "t5": lambda: tiny_seq.t5(gated=False, tied=True),
    "t5 1.1": tiny_seq.t5,
    "bart": tiny_seq.bart,
    "mbart": lambda: tiny_seq.bart("MBart"),
    "pegasus": lambda: tiny_seq.bart("Pegasus"),
    "marian": lambda: tiny_seq.bart("Marian"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_lm.write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", tiny_seq.pairs())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("t5") / "t5", tiny_seq.t5())


@pytest.fixture
def make(make_config, data, folder):
    return lambda **changes: make_config(**{"task": "seq2seq", "data": data, "model": folder} | changes)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_equal_transformers_own(name, data):
    """Its loss with `labels=`, the mean over all target tokens of the batch; and through logits for each row."""
    model, tokenizer = MODELS[name]().eval(), tiny_lm.tokenizer()
    items = read_pairs(read_rows(data), tokenizer).items[:5]
    batch = SEQ2SEQ.collate(items, Base(model, tokenizer))
    lk.attach(model, lk.LoraConfig(rank=2))
    tiny.randomise_factors(model, size=0.05)
    factors = [p for p in model.parameters() if p.requires_grad]
    theirs = model(**batch)
    losses = SEQ2SEQ.losses(model, batch)
    total = sum(item.weight for item in items)
    torch.testing.assert_close(losses.sum() / total, theirs.loss, rtol=1e-5, atol=1e-6)
    by_row = torch.nn.functional.cross_entropy(theirs.logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
    torch.testing.assert_close(losses, by_row, rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(losses.sum() / total, factors)
    for a, b in zip(ours, torch.autograd.grad(theirs.loss, factors), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.mark.parametrize("name", ["t5 1.1", "bart"])
def test_adapters_are_on_both_halves_and_not_on_the_head(name, make, tmp_path):
    job = set_up(make(model=tiny_lm.save(tmp_path / "base", MODELS[name]())))
    adapted = lk.capture(job.model).updates
    for part in ("encoder", "decoder", "EncDecAttention" if name == "t5 1.1" else "encoder_attn"):
        assert any(part in module for module in adapted)
    assert not any("lm_head" in module or "shared" in module for module in adapted)
    gated = {"wi_0", "wi_1", "wo"} if name == "t5 1.1" else {"fc1", "fc2"}
    assert gated <= {module.rpartition(".")[2] for module in adapted}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_t5_in_16_bits_stays_close_to_float32(precision, make):
    """transformers keeps T5's `wo` in float32 beside a float16 model, so the adapted layer sees both."""
    losses = {}
    for each in ("fp32", precision):
        job = set_up(make(precision=each))
        tiny.randomise_factors(job.model, size=0.1)
        loss = SEQ2SEQ.losses(job.model, SEQ2SEQ.collate(job.train[:4], job.base))
        loss.sum().backward()
        losses[each] = loss.detach()
        assert all(torch.isfinite(p.grad).all() for p in job.model.parameters() if p.requires_grad)
    torch.testing.assert_close(losses[precision], losses["fp32"], rtol=0.02, atol=0.5)


def test_an_overflow_names_the_row_and_the_precision(make):
    job = set_up(make())
    with torch.no_grad():
        job.model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match=r"pairs.jsonl, row \d+: the loss is nan\n  T5 and its kin overflow"):
        SEQ2SEQ.evaluate(job.base, job.train, 4)


def test_generation_begins_as_targets_do(make, tmp_path):
    """BART's tokenizer writes <s> first, which is generated first then; the decoder's start is the model's."""
    base = tiny_lm.save(tmp_path / "bart", tiny_seq.bart())
    job = set_up(make(model=base))
    assert (job.model.generation_config.decoder_start_token_id, job.model.generation_config.forced_bos_token_id) == (
        tiny_lm.EOS,
        None,
    )
    tokenizer = load_tokenizer(str(base))
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "!"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="! $A </s>", special_tokens=[("!", start), ("</s>", tiny_lm.EOS)]
    )
    from lorakit.tasks.text.start_token import start_as_trained

    start_as_trained(job.model, tokenizer)
    assert job.model.generation_config.forced_bos_token_id == start
    cut: list[int] = []
    generate(job.model, tokenizer, [[5, 6, 7], [8]], max_new_tokens=3, on_cut=cut.append)
    assert set(cut) <= {0, 1}


def test_prefix_and_limits_are_used_and_recorded(make, data):
    config = make(source_prefix="say: ", max_length=14, max_target_length=24, on_long="drop", steps=1)
    job = set_up(config)
    assert all(job.base.processor.decode(item.ids).startswith("say: ") for item in job.train)
    assert max(len(item.ids) for item in job.train) <= 14
    assert max(len(item.target) for item in job.train) <= 24
    assert job.data.about == {"source_prefix": "say: "}
    facts = dict(job.data.facts)
    assert facts.keys() == {"sources", "targets"}
    assert "dropped" in facts["targets"]
    assert SEQ2SEQ.remembered(job.data.about, None) == {"source_prefix": "say: "}


def test_a_language_the_tokenizer_does_not_have_is_refused(make):
    with pytest.raises(ConfigError, match="source_language: this model's tokenizer has no languages"):
        set_up(make(source_language="en_XX"))


def test_each_kind_of_base_is_sent_to_its_task(make, model_folder, folder, tmp_path, data, capsys):
    with pytest.raises(TrainError, match=r"is no encoder-decoder (.|\n)*--task causal_lm"):
        set_up(make(model=model_folder))
    with pytest.raises(TrainError, match=r"is an encoder-decoder .T5Config.*\n  use --task seq2seq"):
        set_up(make(task="causal_lm"))  # whatever its rows are
    with pytest.raises(TrainError, match=r"is an encoder-decoder .T5Config.*\n  use --task seq2seq"):
        set_up(make(task="causal_lm", data=tiny_lm.write_rows(tmp_path / "own.jsonl", tiny_lm.rows())))
    bert = tmp_path / "bert"
    from transformers import BertConfig

    BertConfig().save_pretrained(bert)
    with pytest.raises(TrainError, match="the task seq2seq needs one, such as T5 or BART"):
        SEQ2SEQ.processor(make(model=bert))
    assert run(["eval", str(data), "--model", str(folder), "--no-text", "--json"]) == 0  # the base tells its task
    assert json.loads(capsys.readouterr().out)["results"][0]["perplexity"] > 1
    assert run(["chat", "--model", str(folder), "--template", "chat"]) == 2
    assert "an encoder-decoder reads one text" in capsys.readouterr().err


def test_positions_are_checked_for_both_sides(make, tmp_path):
    long = [{"source": "a" * n, "target": "b" * m} for n, m in ((120, 3), (2, 2), (3, 3))]
    config = make(
        model=tiny_lm.save(tmp_path / "bart", tiny_seq.bart()),
        data=tiny_lm.write_rows(tmp_path / "long.jsonl", long),
        validation=0,
        max_length="auto",
        on_long="cut",
    )
    assert max(len(item.ids) for item in set_up(config).train) <= tiny_lm.POSITIONS  # the tokenizer's limit
    with pytest.raises(ConfigError, match="more than the 96 positions"):
        set_up(config.replace(max_length=120))
    turned = [{"source": row["target"], "target": row["source"]} for row in long]
    other = config.replace(data=str(tiny_lm.write_rows(tmp_path / "turned.jsonl", turned)), max_target_length=200)
    with pytest.raises(
        TrainError, match=r"row 1: its target has 121 tokens, but .* has 96 positions\n  set max_target"
    ):
        set_up(other)


def test_runs_of_a_sweep_share_their_batches(make, tmp_path):
    from lorakit.train.sweep.sweep import sweep
    from lorakit.train.sweep.sweep_config import expand
    from lorakit.train.sweep.sweep_progress import SweepProgress

    base = tiny_lm.save(tmp_path / "base", tiny_seq.t5(dropout_rate=0.0))
    own = {"model": base, "steps": 2, "eval_every": 2, "sample_tokens": 0}
    plan = expand(make(**own).model_dump() | {"rank": [2, 4], "out": str(tmp_path / "sweep")})
    sweep(plan, SweepProgress(quiet=True))
    for i, config in enumerate(plan.runs.values()):
        alone = train(config.replace(out=str(tmp_path / f"alone-{i}")), QUIET)
        together = RunFolder(config.out).rows()[-1]
        assert together["held_out_loss"] == pytest.approx(alone.best_loss, rel=1e-4)
