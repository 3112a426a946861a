"""From conversations to an adapter that is used as it was trained: template, arguments, date, end tokens, all turns."""

from __future__ import annotations

import json
import signal
from datetime import date

import pytest
import tiny_lm
import torch
import yaml
from safetensors.torch import load_file

import lorakit as lk
from lorakit.bases.load import load_model, load_tokenizer
from lorakit.cli.shared.loading import load
from lorakit.data.chat_record import ChatRecord
from lorakit.data.render import EACH_ANSWER, question_ids
from lorakit.errors import ConfigError, TrainError
from lorakit.generate.generate import end_ids
from lorakit.tasks import task_of
from lorakit.tasks.text import dates
from lorakit.train.progress import Progress
from lorakit.train.train import train

QUIET = Progress(quiet=True)
# It writes today's date, ends answers with <pad>, and takes "(...)" out of all answers but the last.
TEMPLATE = (
    "{{ strftime_now('%y%m%d') }}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content.split(')')[-1] if m.role == 'assistant' and not loop.last else m.content }}"
    "{{ '<pad>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ mood or '' }}{% endif %}"
)


@pytest.fixture
def talks(tmp_path):
    """Conversations of two answers each, in a file."""
    turns = [
        [
            {"role": "user", "content": f"hi {name}"},
            {"role": "assistant", "content": "(one)yo"},
            {"role": "user", "content": "bye"},
            {"role": "assistant", "content": "(two)no"},
        ]
        for name in tiny_lm.NAMES
    ]
    return tiny_lm.write_rows(tmp_path / "talks.jsonl", [{"messages": t} for t in turns])


@pytest.fixture
def template_file(tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    return str(tmp_path / "own.jinja")


@pytest.fixture
def chatting(make_config, talks, template_file):
    """`chatting(**changes)`: a run on conversations, with a template of its own."""
    return lambda **changes: make_config(
        **{"data": talks, "chat_template": template_file, "steps": 6, "sample_tokens": 0, "save_every": 1} | changes
    )


class Stopped(Progress):
    """Presses Ctrl-C at a step."""

    def __init__(self, step: int):
        super().__init__(quiet=True)
        self.at = step

    def row(self, row):
        if row["step"] == self.at and "loss" in row:
            signal.raise_signal(signal.SIGINT)


class Day(date):
    """A calendar that tests turn."""

    now = date(2025, 3, 4)

    @classmethod
    def today(cls):
        return cls.now


@pytest.fixture
def calendar(monkeypatch):
    monkeypatch.setattr(dates, "Date", Day)
    monkeypatch.setattr(Day, "now", date(2025, 3, 4))
    return lambda *day: monkeypatch.setattr(Day, "now", date(*day))


def factors(result):
    return load_file(result.adapter / "adapter_model.safetensors")


def test_what_a_conversation_was_written_with_is_kept_and_used_again(chatting, calendar):
    config = chatting(chat_template_kwargs={"mood": "!"})
    adapter = train(config, QUIET).adapter
    about = json.loads((adapter / "lorakit.json").read_text())["data"]
    kept = {k: about[k] for k in ("template", "chat_template", "chat_template_kwargs", "date", "end_tokens")}
    assert kept == {
        "template": "chat",
        "chat_template": TEMPLATE,
        "chat_template_kwargs": {"mood": "!"},
        "date": "2025-03-04",
        "end_tokens": ["<pad>"],
    }
    assert (adapter / "chat_template.jinja").read_text() == TEMPLATE
    calendar(2026, 1, 1)
    loaded = load(config.model, [str(adapter)], "fp32")
    ids = question_ids("hi", loaded.tokenizer, loaded.style_for("auto"), loaded.options)
    assert loaded.tokenizer.decode(ids) == "250304<user>hi<assistant>!"
    assert end_ids(loaded.model, loaded.tokenizer) == [tiny_lm.PAD, tiny_lm.EOS]
    assert end_ids(load(config.model, [], "fp32").model, loaded.tokenizer) == [tiny_lm.EOS]
    assert load(config.model, [str(adapter)], "fp32", kwargs={"mood": "?"}).options.kwargs == {"mood": "?"}


def test_a_run_stopped_yesterday_ends_with_the_bits_of_one_that_was_not(chatting, calendar, tmp_path):
    whole = train(chatting(out=tmp_path / "whole"), QUIET)
    assert train(chatting(), Stopped(2)).stopped == "SIGINT"
    calendar(2025, 3, 5)
    resumed = train(chatting(), QUIET)
    assert (resumed.step, resumed.stopped) == (6, None)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["date"] == "2025-03-04"
    for name, tensor in factors(whole).items():
        assert torch.equal(tensor, factors(resumed)[name])
    given = train(chatting(out=tmp_path / "given", date="2025-03-04"), QUIET)
    assert all(torch.equal(tensor, factors(given)[name]) for name, tensor in factors(whole).items())
    with pytest.raises(TrainError, match="the tokenized rows: SHA-256 was"):
        train(chatting(date="2025-03-06"), QUIET)


def test_a_date_in_yaml_needs_no_quotes_and_a_template_without_a_date_keeps_none(chatting, make_config, talks):
    assert chatting(**yaml.safe_load("date: 2025-03-04")).date == "2025-03-04"
    with pytest.raises(ConfigError, match="expected YYYY-MM-DD"):
        chatting(date="tomorrow")
    config = make_config(data=talks)
    assert dates.dated(config, load_tokenizer(config.model), {}) == config


def test_each_answer_of_a_rewriting_template_is_trained_and_the_panel_counts_them(chatting, capsys):
    config = chatting(validation=0)
    data = task_of("causal_lm").data(config, load_tokenizer(config.model))
    assert len(data.train) == 2 * len(tiny_lm.NAMES)
    assert data.notes == {f"{EACH_ANSWER} (24 rows)": 12}
    last = task_of("causal_lm").data(config.replace(turns="last"), load_tokenizer(config.model))
    assert len(last.train) == len(tiny_lm.NAMES)
    train(config.replace(steps=1), Progress())
    panel = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "24 rows to train on" in panel
    assert f"12 rows: {EACH_ANSWER} (24 rows)" in panel
    assert f"{date.today().isoformat()}, written by the chat template" in panel
    assert "<pad>, as the chat template writes; generation stops there" in panel


def test_samples_are_asked_for_as_rows_are_written(chatting):
    config = chatting(sample_prompts=["hi Ada"], sample_tokens=2, date="2025-03-04")
    tokenizer = load_tokenizer(config.model)
    task = task_of("causal_lm")
    data = task.data(config, tokenizer)
    model = task.load(config, tokenizer, data, torch.float32, torch.device("cpu"))
    assert end_ids(model, tokenizer) == [tiny_lm.PAD, tiny_lm.EOS]
    (prompt,) = task.prompts(config, task_base(model, tokenizer), data)
    assert tokenizer.decode(prompt.ids) == "250304<user>hi Ada<assistant>"


def task_base(model, tokenizer):
    from lorakit.tasks.task import Base

    return Base(model, tokenizer)


def test_full_fine_tuning_saves_a_model_with_template_and_ends(chatting):
    config = chatting(method="full", steps=1)
    folder = train(config, QUIET).adapter
    model = load_model(str(folder), torch.float32, torch.device("cpu"))
    assert sorted(model.generation_config.eos_token_id) == [tiny_lm.PAD, tiny_lm.EOS]
    assert load_tokenizer(str(folder)).chat_template == TEMPLATE


@pytest.mark.parametrize("receiver", ["vllm", "ollama"])
def test_exports_hold_the_template_and_the_end_tokens(chatting, tmp_path, receiver):
    from lorakit.export.export import export

    config = chatting(steps=1, chat_template_kwargs={"mood": "!"})
    source = train(config, QUIET).adapter
    out = tmp_path / "out"
    result = export(lk.Adapter.load(source), out, receiver, base=config.model, model="tiny", fix=True)
    assert result.notes[-1] == 'trained with chat_template_kwargs {"mood": "!"}: give them with every request'
    assert ("a chat template of its own" in result.notes[0]) == (receiver == "ollama")
    if receiver == "ollama":
        assert (out / "Modelfile").read_text() == 'FROM tiny\nADAPTER ./adapter.gguf\nPARAMETER stop "<pad>"\n'
    else:
        assert (out / "chat_template.jinja").read_text() == TEMPLATE
        assert out / "chat_template.jinja" in result.files
        assert json.loads((out / "lorakit.json").read_text())["data"]["end_tokens"] == ["<pad>"]


def test_a_merged_gguf_has_the_template_and_stops_at_the_end_tokens(chatting, tmp_path):
    from gguf import GGUFReader

    from lorakit.export.merged import export_merged

    config = chatting(steps=1, chat_template_kwargs={"mood": "!"})
    adapter = lk.Adapter.load(train(config, QUIET).adapter)
    made = export_merged(adapter, config.model, tmp_path / "out", "ollama")
    files = made.files
    assert 'trained with chat_template_kwargs {"mood": "!"}: give them with every request' in made.warnings
    assert 'PARAMETER stop "<pad>"' in files[1].read_text()
    fields = GGUFReader(files[0]).fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tiny_lm.PAD


def test_a_merged_model_has_the_template_and_stops_at_the_end_tokens(chatting, tmp_path):
    from lorakit.checkpoint import merge_checkpoint

    config = chatting(steps=1)
    merge_checkpoint(config.model, train(config, QUIET).adapter, tmp_path / "merged")
    model = load_model(str(tmp_path / "merged"), torch.float32, torch.device("cpu"))
    assert sorted(model.generation_config.eos_token_id) == [tiny_lm.PAD, tiny_lm.EOS]
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == TEMPLATE


@pytest.mark.parametrize(
    "about", [None, [], {"template": "x", "chat_template": 3, "date": 4, "end_tokens": "a", "chat_template_kwargs": []}]
)
def test_a_record_that_is_none_is_no_record(about):
    assert ChatRecord.of({"data": about}) == ChatRecord()
