"""Held-out rows of a file of their own that are cut, dropped or left out have a note that names the file: all tasks of
text.
"""

from __future__ import annotations

import pytest
import tiny_lm
import tiny_seq
import tiny_tokenizers

from lorakit.tasks import task_names, task_of

LONG = " ".join(["tea"] * 60)  # 60 tokens and more of either tokenizer
ELSEWHERE = {"question": "who", "context": f"{LONG} Ada Bo", "answers": {"text": [f"{LONG[-90:]} Ada"]}}
# task -> a row to train on, a longer one to hold out, and what is said of it besides the row of weight 0
ROWS = {
    "causal_lm": ({"prompt": "in", "completion": "Ada"}, {"prompt": "in", "completion": LONG}, "not evaluated"),
    "classification": ({"text": "in", "label": "a"}, {"text": LONG, "label": "a"}, "evaluated cut"),
    "embeddings": ({"anchor": "in", "positive": "Ada"}, {"anchor": "in", "positive": LONG}, "evaluated cut"),
    "multiple_choice": (
        {"question": "who", "choices": ["Ada", "Bo"], "answer": 0},
        {"question": "who", "choices": ["Ada", LONG], "answer": 0},
        "not evaluated",
    ),
    "preference": (
        {"prompt": "in", "chosen": "Ada", "rejected": "Bo"},
        {"prompt": "in", "chosen": LONG, "rejected": "Bo"},
        "not evaluated",
    ),
    "question_answering": (
        {"question": "who", "context": "in Ada", "answers": {"text": ["Ada"], "answer_start": [3]}},
        ELSEWHERE,
        "an answer that no window holds",
    ),
    "regression": ({"text": "in", "label": 1.5}, {"text": LONG, "label": 0.5}, "evaluated cut"),
    "seq2seq": ({"source": "in", "target": "Ada"}, {"source": "in", "target": LONG}, "not evaluated"),
    "token_classification": (
        {"tokens": ["Ada", "in"], "tags": ["B-PER", "O"]},
        {"tokens": LONG.split(), "tags": ["O"] * 60},
        "words at their ends are left out",
    ),
}
OF_MEDIA = {"image_classification", "speech", "text_to_image", "vision_language"}  # their rows are pictures and sounds


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder, tokenizer = tmp_path_factory.mktemp("held-out"), tiny_tokenizers.wordpiece()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **size))
    bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    tiny_lm.save(folder / "llama")
    tiny_lm.save(folder / "t5", tiny_seq.t5())
    return folder


def test_every_task_of_text_has_a_row_here():
    assert ROWS.keys() == set(task_names()) - OF_MEDIA


@pytest.mark.parametrize("task", ROWS)
def test_no_held_out_row_is_changed_or_left_out_without_a_note(task, bases, tmp_path):
    short, long, said = ROWS[task]
    second = short | ({"label": "b"} if task == "classification" else {"label": 2.5} if "label" in short else {})
    base = {"causal_lm": "llama", "preference": "llama", "seq2seq": "t5"}.get(task, "bert")
    held = tiny_lm.write_rows(tmp_path / "held.jsonl", [short, short | {"weight": 0}, long])
    limit = {"window": 12} if task == "question_answering" else {"max_length": 24}
    config = tiny_lm.config(
        bases / base,
        tiny_lm.write_rows(tmp_path / "rows.jsonl", [short, second]),
        tmp_path / "run",
        task=task,
        validation=str(held),
        **limit,
    )
    made = task_of(task).data(config, task_of(task).processor(config))
    of_held = {note: count for note, count in made.notes.items() if str(held) in note}
    assert any(said in note and count == 1 for note, count in of_held.items()), made.notes
    assert any("weight 0" in note and count == 1 for note, count in of_held.items()), made.notes
    assert len(made.train) == 2
