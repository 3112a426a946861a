"""Every setting of a task that decides what its rows are comes back from a result's record, or is here with a reason:
`lorakit eval` and `predict` read their rows as the run did, without being told again.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_lm
import tiny_seq
import tiny_speech
import tiny_tokenizers
import tiny_vision
import tiny_visual

from lorakit.tasks import task_names, task_of

# setting -> why a result does not remember it
FORGOTTEN = {
    "broken": "of the files at hand, not of the model: a picture that cannot be read is an error in eval and predict",
    "columns": "of the files at hand",
    "max_length": "eval and predict read as much as the model has positions for",
    "max_target_length": "as max_length",
    "mix": "of training rows alone",
    "on_long": "eval cuts: nothing is trained on what is missing",
    "flip": "pictures are mirrored in training alone",
    "random_crop": "pictures are cropped in training alone",
}
# The same for single tasks. Chat templates come back from the record of conversations (`data/chat_record.py`).
CHAT = ("template", "chat_template", "chat_template_kwargs", "date")
OF_TASKS = {
    "causal_lm": {
        **dict.fromkeys(CHAT, "the record of conversations has it"),
        "answer_after": "of the files at hand: eval has a flag for it",
        "train_on": "eval measures answers, whatever was trained on",
        "turns": "eval has a flag for it",
    },
    "preference": {
        **dict.fromkeys(CHAT, "the record of conversations has it"),
        **dict.fromkeys(("answer_after", "train_on", "turns"), "the task does not have it, and says so"),
    },
}
NOT_EVALUATED = {"text_to_image"}  # eval and predict name the commands for pictures
# task -> rows, and settings that are not the defaults
TEXT = {
    "causal_lm": ([{"prompt": "in", "completion": "Ada"}] * 2, {}),
    "classification": ([{"text": "in", "label": "a"}, {"text": "Ada", "label": "b"}], {"labels": ["b", "a"]}),
    "embeddings": (
        [{"text": "in", "text_pair": "Ada", "score": 1.0}, {"text": "in", "text_pair": "Bo", "score": 4.0}],
        {
            "pooling": "cls",
            "query_prefix": "in ",
            "passage_prefix": "who ",
            "score_range": [0.0, 10.0],
            "contrast_temperature": 0.2,
        },
    ),
    "multiple_choice": ([{"question": "who", "choices": ["Ada", "Bo"], "answer": 0}] * 2, {}),
    "preference": ([{"prompt": "in", "chosen": "Ada", "rejected": "Bo"}] * 2, {"loss": "ipo"}),
    "question_answering": (
        [{"question": "who", "context": "in Ada", "answers": {"text": ["Ada"], "answer_start": [3]}}] * 2,
        {"window": 24, "stride": 5, "no_answer": True},
    ),
    "regression": ([{"text": "in", "label": 1.5}, {"text": "Ada", "label": 0.5}], {}),
    "seq2seq": (
        [{"source": "in", "target": "Ada"}] * 2,
        {"source_prefix": "say: ", "source_language": "en_XX", "target_language": "de_DE"},
    ),
    "token_classification": ([{"tokens": ["Ada", "in"], "tags": ["X", "O"]}] * 2, {"labels": ["X", "O"]}),
}
MEDIA = {
    "image_classification": {"background": "black", "animated": "first", "labels": ["red", "green", "blue"]},
    "speech": {"language": "french", "translate": True},
    "vision_language": {"background": "black", "animated": "first", "train_on": "all", "turns": "last"},
}


def changes(task):
    return TEXT[task][1] if task in TEXT else MEDIA[task]


@pytest.fixture
def made(tmp_path):
    """`made(task)`: the task's record of a run with `changes`, and a base that has no labels of its own."""

    def make(task):
        if task in TEXT:
            rows, own = TEXT[task]
            folder, data = tmp_path / "base", tiny_lm.write_rows(tmp_path / "rows.jsonl", rows)
            tiny_lm.save(folder, tiny_seq.t5()) if task == "seq2seq" else tiny_lm.save(folder)
            processor = tiny_tokenizers.wordpiece() if task in ("embeddings", "question_answering") else None
        else:
            save, write = {
                "image_classification": (tiny_vision.save, tiny_vision.write_folders),
                "speech": (tiny_speech.save, tiny_speech.write_rows),
                "vision_language": (tiny_visual.save, tiny_visual.write_rows),
            }[task]
            own, folder, data, processor = MEDIA[task], save(tmp_path / "base"), write(tmp_path / "own"), None
        config = tiny_lm.config(folder, data, tmp_path / "run", task=task, validation=0, **own)
        plain = {name: value for name, value in own.items() if not name.endswith("_language")}  # T5 has no such codes
        first = (
            config
            if task == "speech"
            else tiny_lm.config(folder, data, tmp_path / "run", task=task, validation=0, **plain)
        )
        return task_of(task).data(config, processor or task_of(task).processor(first)).about

    return make


def rows_settings(task):
    """The settings that decide what the rows are, of the task's own classes."""
    settings = task_of(task).settings
    return {name for cls in settings.__mro__ for name in cls.__dict__.get("rows", ())} & settings.model_fields.keys()


def test_every_task_has_a_row_here():
    assert TEXT.keys() | MEDIA.keys() | NOT_EVALUATED == set(task_names())


@pytest.mark.parametrize("task", [*TEXT, *MEDIA])
def test_a_result_remembers_how_its_rows_were_read(task, made):
    own = changes(task)
    settings = task_of(task).settings
    known = rows_settings(task)
    forgotten = FORGOTTEN.keys() | OF_TASKS.get(task, {}).keys()
    assert known <= own.keys() | forgotten, f"remember {known - own.keys() - forgotten}, or say why not"
    assert all(
        value != settings.model_fields[name].get_default(call_default_factory=True) for name, value in own.items()
    )
    base = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    found = task_of(task).remembered(made(task), base)
    assert {name: found.get(name) for name in own} == own


def test_no_reason_is_given_for_what_is_no_setting():
    of_all = {name for task in [*TEXT, *MEDIA] for name in rows_settings(task)}
    assert FORGOTTEN.keys() <= of_all
    assert all(reasons.keys() <= rows_settings(task) for task, reasons in OF_TASKS.items())


@pytest.mark.parametrize("task", ["classification", "image_classification", "token_classification"])
def test_names_that_look_like_placeholders_are_forgotten_of_bases_alone(task):
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    base = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert task_of(task).remembered({}, base) == {}
    assert task_of(task).remembered({"labels": names}, base) == {"labels": names}
