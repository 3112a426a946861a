"""Embeddings: InfoNCE by hand, a batch as a whole however it is encoded, vectors that are the same in another process
and in PEFT; a tiny model really learns to find what belongs together.
"""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
import tiny_lm
import tiny_seq
import torch
import torch.nn.functional as F
from transformers import AutoModel

import lorakit as lk
from lorakit.bases.load import load_tokenizer
from lorakit.cli import run
from lorakit.data.contrasts import Encoding, read_contrasts
from lorakit.data.parse import Row
from lorakit.errors import TrainError
from lorakit.tasks import task_of
from lorakit.tasks.task import Base
from lorakit.tasks.text.vectors import contrast_losses, encoded, masked, pooled
from lorakit.train.progress import Progress
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
EMBEDDINGS = task_of("embeddings")
OTHER_PROCESS = """
import json, sys
import peft, torch
from transformers import AutoModel, AutoTokenizer
base, result, text = sys.argv[1:]
torch.manual_seed(77)
model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), result).eval()
states = model(**AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")).last_hidden_state[0]
print(json.dumps(torch.nn.functional.normalize(states.mean(0), dim=0).tolist()))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Each name has its own food, whatever is said of it: what belongs together shares no word."""
    made = [
        {"anchor": f"{name} {word}", "positive": f"{tiny_seq.FOODS[i % 6]}{i}"}
        for i, name in enumerate(tiny_lm.NAMES)
        for word in ("asks", "wants", "likes")
    ]
    return tiny_lm.write_rows(tmp_path_factory.mktemp("contrasts") / "rows.jsonl", made)


@pytest.fixture
def make(make_config, rows):
    values = {"task": "embeddings", "data": rows, "batch_size": 12, "micro_batch": "auto", "patience": 0}
    return lambda **changes: make_config(**values | changes)


def items_of(*values, **options):
    encoding = Encoding(tiny_lm.tokenizer(), **options)
    return read_contrasts([Row(dict(each), "rows.jsonl", i) for i, each in enumerate(values, 1)], encoding).items


def test_the_loss_of_a_batch_is_infonce_by_hand(make):
    job = set_up(make(contrast_temperature=0.1))
    items = [*{item.texts[1]: item for item in job.train}.values()][:5]  # nothing is masked
    found = EMBEDDINGS.losses(job.model, EMBEDDINGS.collate(items, job.base)).detach()

    def vector(ids):
        state = job.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        return state / state.norm()

    anchors, positives = (torch.stack([vector(item.texts[side]) for item in items]) for side in (0, 1))
    for i, loss in enumerate(found):
        scores = [float((anchors[i] @ positives[j]).detach()) / 0.1 for j in range(5)]
        by_hand = torch.tensor(scores, dtype=torch.float64).logsumexp(0) - scores[i]
        assert float(loss) == pytest.approx(float(by_hand), rel=1e-4, abs=1e-5)


def test_what_is_right_for_a_row_is_no_negative_of_it():
    """Row 2 has row 1's positive, row 3 row 1's anchor; negatives belong to all rows."""
    items = items_of(
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "b", "positive": "p", "negatives": ["q"]},
        {"anchor": "a", "positive": "q"},
    )
    # candidates: p, p, q, n, q
    assert masked(items).tolist() == [
        [False, True, True, False, True],
        [True, False, False, False, False],
        [True, True, False, False, True],
    ]
    vectors = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    losses = contrast_losses(vectors[:3], vectors[3:], masked(items), torch.tensor(1.0))
    left = torch.stack([vectors[0] @ vectors[3], vectors[0] @ vectors[6]])  # row 1: its own and n
    assert float(losses[0]) == pytest.approx(float(left.logsumexp(0) - left[0]), rel=1e-5)


def test_portions_change_neither_loss_nor_gradients(make):
    """As GradCache: encoded two texts at a time, with dropout, against all at once."""
    job = set_up(make(dropout=0.2))
    job.model.train()
    batch = EMBEDDINGS.collate(job.train[:6], job.base)
    factors = [p for p in job.model.parameters() if p.requires_grad]
    for p in factors:
        torch.nn.init.normal_(p, std=0.1)
    job.model.eval()
    length = batch["input_ids"].shape[1]
    grads = []
    for at_once in (1 << 20, 2 * length):
        vectors = encoded(job.model, batch, at_once)
        loss = contrast_losses(vectors[:6], vectors[6:], batch["masked"], batch["temperature"]).sum()
        grads.append((loss.detach(), torch.autograd.grad(loss, factors)))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    for whole, parts in zip(grads[0][1], grads[1][1], strict=True):
        assert (whole - parts).norm() <= 1e-4 * whole.norm() + 1e-6
    job.model.train()  # dropout: the same masks are drawn again in backward, so the gradients are finite and repeat
    repeated = []
    for _ in range(2):
        torch.manual_seed(3)
        loss = encoded(job.model, batch, 2 * length).sum()
        repeated.append(torch.autograd.grad(loss, factors))
    assert all(torch.equal(a, b) for a, b in zip(*repeated, strict=True))


def test_a_batch_is_not_divided(make):
    with pytest.raises(TrainError, match=r"micro_batch: 4: a batch of 12 rows is contrasted as a whole(.|\n)*omit"):
        set_up(make(micro_batch=4))
    assert set_up(make()).micro_batch.value == 12


def test_pooling():
    texts = [[5, 6, 7], [8]]
    assert pooled(texts, "mean", 0)["pool"][0, :4].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert pooled(texts, "cls", 0)["pool"].argmax(1).tolist() == [0, 0]
    assert pooled(texts, "last", 0)["pool"].argmax(1).tolist() == [2, 0]
    (item,) = items_of({"anchor": "a", "positive": "b"}, with_end=True, first="q: ", second="p: ")
    assert [tiny_lm.tokenizer().decode(text) for text in item.texts] == ["q: a</s>", "p: b</s>"]


def test_a_tiny_model_learns_to_find_what_belongs_together(make, rows, tmp_path, capsys):
    config = make(steps=60, validation=0, learning_rate=2e-2, rank=8, eval_every=60)
    result = train(config, QUIET)
    told = json.loads((result.adapter / "adapter_config.json").read_text())
    assert told["task_type"] == "FEATURE_EXTRACTION"
    flags = ["--model", config.model, "--precision", "fp32"]
    capsys.readouterr()
    figures = []
    for own in (["--task", "embeddings"], ["--adapter", str(result.adapter)]):
        assert run(["eval", str(rows), *flags, *own, "--json"]) == 0
        figures += json.loads(capsys.readouterr().out)["results"]
    base, tuned = figures
    assert base["recall_at_1"] < 0.2
    assert tuned["recall_at_1"] > 0.7, tuned
    assert tuned["recall_at_10"] >= tuned["recall_at_5"] >= tuned["recall_at_1"]
    text = "Ada asks"
    asked = tiny_lm.write_rows(tmp_path / "asked.jsonl", [{"text": text}, {"query": text, "passage": "tea0"}])
    assert run(["predict", str(asked), *flags, "--adapter", str(result.adapter)]) == 0
    first, second = (json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines())
    assert first["vector"] == second["vector"]
    cosine = torch.tensor(second["vector"]) @ torch.tensor(second["vector_pair"])
    assert second["similarity"] == pytest.approx(float(cosine), abs=1e-5)
    assert run(["generate", text, *flags, "--adapter", str(result.adapter)]) == 1
    assert (
        "for the task embeddings, which has no answer to a prompt\n  use it on rows: lorakit predict"
        in capsys.readouterr().err
    )
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, config.model, str(result.adapter), text],
        capture_output=True,
        text=True,
        check=True,
    )
    torch.testing.assert_close(
        torch.tensor(json.loads(done.stdout)), torch.tensor(first["vector"]), atol=1e-5, rtol=1e-4
    )


def test_scores_are_correlated_and_their_range_is_recorded(make, tmp_path):
    values = [
        {"sentence1": f"{name} eats", "sentence2": f"{name} {verb}", "score": score}
        for name in tiny_lm.NAMES
        for verb, score in (("eats", "4.8"), ("runs", "2"), ("flies away", "0.4"))
    ]
    config = make(
        data=tiny_lm.write_rows(tmp_path / "scored.jsonl", values), steps=30, learning_rate=2e-2, eval_every=30
    )
    job = set_up(config)
    assert job.data.about["score_range"] == [0.0, 5.0]
    before = EMBEDDINGS.evaluate(job.base, job.held_out, 4)
    train(config, QUIET)
    from lorakit.train.run import Run

    Run(job, QUIET)
    after = EMBEDDINGS.evaluate(job.base, job.held_out, 4)
    assert after["loss"] < before["loss"]
    assert after["spearman"] > 0.7


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_an_encoder_and_a_decoder_load_in_peft_on_automodel(pooling, make, tmp_path):
    """BERT's pooler, which its folder lacks here, is adapted by all-linear, and not used."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=96,
            pad_token_id=tiny_lm.PAD,
        )
    )
    config = make(model=tiny_lm.save(tmp_path / "bert", bert), steps=3, pooling=pooling, validation=0)
    result = train(config, QUIET)
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(config.model), result.adapter).eval()
    ours = lk.attach(AutoModel.from_pretrained(config.model), lk.Adapter.load(result.adapter), force=True).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_an_encoder_decoder_is_refused_and_rows_are_recognized(make, tmp_path):
    with pytest.raises(TrainError, match="encoder-decoder"):
        set_up(make(model=tiny_lm.save(tmp_path / "t5", tiny_seq.t5())))
    assert EMBEDDINGS.recognizes({"query": "a", "positive": "b"})
    assert not EMBEDDINGS.recognizes({"text": "a", "text_pair": "b", "score": 1})
    assert not EMBEDDINGS.recognizes({"prompt": "a", "completion": "b"})


def test_predictions_do_not_depend_on_the_batch(make, model_folder):
    job = set_up(make())
    items = job.train[:7]
    base = Base(job.model, load_tokenizer(str(model_folder)), job.config)
    one, many = (EMBEDDINGS.predict(job.config, base, items, size) for size in (1, 7))
    for a, b in zip(one, many, strict=True):
        assert a["vector"] == pytest.approx(b["vector"], abs=1e-5)
