"""Speech: tones become words, the decoder's start, languages, transcripts as a plain loop would write them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_lm
import tiny_speech
import tiny_visual
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSpeechSeq2Seq, GenerationMixin

from lorakit.cli import run
from lorakit.errors import ConfigError, DataError, LorakitError, TrainError
from lorakit.tasks import speech as task
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run import Run
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return tiny_speech.save(tmp_path_factory.mktemp("tiny-speech") / "whisper")


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return tiny_speech.save(tmp_path_factory.mktemp("tiny-speech-en") / "whisper", several=False)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return tiny_speech.write_rows(tmp_path_factory.mktemp("tones") / "own", 36)


@pytest.fixture
def make(whisper, tones, tmp_path):
    def made(**changes):
        values = {
            "task": "speech",
            "model": whisper,
            "data": tones,
            "out": tmp_path / "run",
            "language": "en",
            "rank": 8,
            "steps": 4,
            "batch_size": 12,
            "micro_batch": 12,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "threads": 1,
            "validation": 0.25,
            "eval_every": 4,
            "patience": 0,
            "sample_tokens": 12,
        } | changes
        if values.get("method") == "full":
            del values["rank"]
        return TrainConfig(**values | {name: str(values[name]) for name in ("model", "data", "out")})

    return made


def test_tones_it_has_not_heard_become_words(make):
    """The base is random: its output layer, tied to the embedding, is trained too."""
    result = train(make(method="full", steps=80, eval_every=40, learning_rate=4e-3), QUIET)
    rows = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]
    rates = [row["held_out_wer"] for row in rows if "held_out_wer" in row]
    assert rates[-1] <= 0.25  # of three words, guessing is wrong two times in three
    model = AutoModelForSpeechSeq2Seq.from_pretrained(result.adapter)
    assert model.config.model_type == "whisper"
    assert any((result.adapter / f"{name}_config.json").is_file() for name in ("preprocessor", "processor"))


def test_the_start_is_given_and_the_text_with_its_end_is_trained(make):
    job = set_up(make())
    item = job.train[0]
    tokenizer = tiny_speech.tokenizer()
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(list(item.start)) == names
    batch = job.task.collate(job.train[:3], job.base)
    for row, each in enumerate(job.train[:3]):
        labels = batch["labels"][row]
        kept = labels[labels != -100].tolist()
        assert tokenizer.decode(kept) == f"{each.text}<|endoftext|>"
        first = int((labels != -100).nonzero()[0, 0])
        assert batch["decoder_input_ids"][row, : first + 1].tolist() == list(each.start)
        assert batch["decoder_input_ids"][row, first + 1 : first + len(kept)].tolist() == kept[:-1]
    assert "starts from <|startoftranscript|> <|en|>" in dict(job.data.facts)["decoder"]


def test_another_language_and_translation_start_otherwise(make, tmp_path):
    job = set_up(make(language="french", translate=True))
    names = tiny_speech.tokenizer().convert_ids_to_tokens(list(job.train[0].start))
    assert names == ["<|startoftranscript|>", "<|fr|>", "<|translate|>", "<|notimestamps|>"]
    assert task.remembered(job.data.about, None) == {"language": "french", "translate": True}
    assert job.data_hash != set_up(make(out=tmp_path / "other")).data_hash


def test_transcripts_are_those_of_a_plain_loop_whatever_shares_their_batch(make):
    config = make(steps=6, learning_rate=3e-2)
    train(config, QUIET)
    job = set_up(config)
    Run(job, QUIET)
    items = job.train[:4]
    found = task.predict(config, job.base, items, 3)
    assert found == task.predict(config, job.base, items, 1)
    end = job.base.processor.tokenizer.eos_token_id
    with torch.inference_mode():
        for item, each in zip(items, found, strict=True):
            features, ids = job.base.processor.features([item.sound]), list(item.start)
            for _ in range(12):
                logits = job.model.eval()(input_features=features, decoder_input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == end:
                    break
            text = job.base.processor.tokenizer.decode(ids[len(item.start) :], skip_special_tokens=True)
            assert each["text"] == text.strip()
            assert each.get("cut", False) == (ids[-1] != end)


def test_the_held_out_word_error_rate_is_that_of_the_transcripts(make, monkeypatch):
    """What the model writes is given here, and its mistakes are counted by hand."""
    config = make()
    job = set_up(config)
    items = [next(item for item in job.train if item.text == text) for text in ("low", "mid high", "high low")]
    heard = iter(["low", "high", "high high mid"])  # right; one word left out; one substituted and one added
    tokenizer, limits = job.base.processor.tokenizer, []

    def generate(model, decoder_input_ids, max_new_tokens, **options):
        limits.append(max_new_tokens)
        said = [tokenizer(next(heard), add_special_tokens=False).input_ids for _ in decoder_input_ids]
        rows = [[*start, *ids, tokenizer.eos_token_id] for start, ids in zip(decoder_input_ids, said, strict=True)]
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    assert job.task.evaluate(job.base, items, 2)["wer"] == pytest.approx(3 / 5)
    assert limits == [12, 12]
    without = set_up(make(sample_tokens=0, out=f"{config.out}-2"))
    assert "wer" not in without.task.evaluate(without.base, without.held_out, 4)


def test_a_sound_at_another_rate_is_heard_as_the_same(make, tmp_path):
    samples = tiny_speech.tone(700.0, 0.5, 48000)
    tiny_speech.write_wav(tmp_path / "fast.wav", samples, 48000, width=3)
    tiny_speech.write_wav(tmp_path / "slow.wav", tiny_speech.tone(700.0, 0.5))
    rows = [{"audio": name, "text": "mid"} for name in ("fast.wav", "slow.wav")]
    job = set_up(make(data=tiny_lm.write_rows(tmp_path / "rows.jsonl", rows), validation=0))
    fast, slow = job.base.processor.features([item.sound for item in job.train])
    assert (fast - slow)[:, 2:46].abs().max() < 0.05  # of about 2; the edges of the sound hear the filter
    assert fast.shape == (tiny_speech.MELS, 100)


def test_gradient_checkpointing_changes_nothing_but_memory(make, tmp_path):
    adapters = []
    for on in (False, True):
        result = train(make(gradient_checkpointing=on, steps=2, out=tmp_path / f"run-{on}"), QUIET)
        adapters.append(load_file(result.adapter / "adapter_model.safetensors"))
    for key, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][key], rtol=1e-4, atol=1e-6)
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert written["task_type"] is None


# ------------------------------------------------------------------------------------- refusals


def test_a_base_of_several_languages_must_be_told_which(make, english, tmp_path):
    with pytest.raises(ConfigError, match=r"knows several; say which one is spoken(.|\n)*language: en"):
        set_up(make(language=None))
    with pytest.raises(ConfigError, match="language: Unsupported language: klingon"):
        set_up(make(language="klingon"))
    with pytest.raises(ConfigError, match="knows one language only"):
        set_up(make(model=english))
    job = set_up(make(model=english, language=None))
    names = job.base.processor.tokenizer.convert_ids_to_tokens(list(job.train[0].start))
    assert names == ["<|startoftranscript|>", "<|notimestamps|>"]


def test_what_is_no_whisper_is_refused(make, tmp_path):
    with pytest.raises(LorakitError, match=r"has no processor of speech|cannot load"):
        set_up(make(model=tiny_visual.save(tmp_path / "llava")))


def test_a_text_that_is_longer_than_the_decoder_is_named(make, tmp_path):
    tiny_speech.write_wav(tmp_path / "a.wav", tiny_speech.tone(440.0, 0.2))
    rows = [{"audio": "a.wav", "text": "a" * 60}]
    with pytest.raises(TrainError, match=r"a\.wav: its text has 65 tokens .* 40 positions"):
        set_up(make(data=tiny_lm.write_rows(tmp_path / "rows.jsonl", rows), validation=0))


def test_a_sound_that_changes_after_the_start_is_named(make, tmp_path):
    tiny_speech.write_wav(tmp_path / "a.wav", np.zeros(800))
    rows = tiny_lm.write_rows(tmp_path / "rows.jsonl", [{"audio": "a.wav", "text": "low"}])
    job = set_up(make(data=rows, validation=0))
    (tmp_path / "a.wav").unlink()
    with pytest.raises(DataError, match=r"a\.wav: cannot be read"):
        job.task.collate(job.train, job.base)


def test_train_eval_and_predict_on_the_command_line(whisper, tones, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out, model = tmp_path / "run", ["--model", str(whisper)]
    flags = ["--rank", "4", "--steps", "4", "--batch-size", "6", "--lr", "1e-2", "--precision", "fp32"]
    flags += ["--task", "speech", "--threads", "1", "--sample-tokens", "6", "--language", "en"]
    assert run(["train", "--data", str(tones), *model, "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert "speech: write what is said in a sound" in said
    assert "sounds with texts, 0.4 minutes" in said
    judge = [str(tones), *model, "--adapter", f"{out}/adapter", "--precision", "fp32"]
    assert run(["eval", *judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "speech"  # and its language: by the adapter
    assert found["results"][0]["wer"] > 0
    assert run(["eval", *judge, "--json", "--max-new-tokens", "2"]) == 0
    (short,) = json.loads(capsys.readouterr().out)["results"]
    assert short["cut"] == short["rows"]  # two letters, and no end: the limit counts, and what it costs is said
    assert run(["eval", *judge, "--json", "--no-text"]) == 0
    assert "wer" not in json.loads(capsys.readouterr().out)["results"][0]
    bare = [{"audio": str(tones.parent / "00.wav"), "id": 7}]
    asked = tiny_lm.write_rows(tmp_path / "asked.jsonl", bare)
    assert run(["predict", str(asked), *judge[1:], "--max-new-tokens", "4"]) == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["id"] == 7
    assert isinstance(line["prediction"]["text"], str)
