"""`lorakit chat`: a conversation, its commands, and its end."""

from __future__ import annotations

import tiny_lm

from lorakit.generate import generate


def test_chat_answers_and_obeys_its_commands(lorakit, model, trained):
    lines = [
        "Ada: 3\\n",
        "",
        "/base",
        "Ada: 3\\n",
        "/adapter adapter",
        "Ada: 3\\n",
        "/adapter nobody",
        "/what",
        "/reset",
        "/quit",
        "never",
    ]
    args = [
        "--model",
        model,
        "--adapter",
        trained / "adapter",
        "--precision",
        "fp32",
        "--temperature",
        "0",
        "--max-new-tokens",
        "6",
    ]
    code, out, _ = lorakit("chat", *args, stdin="\n".join(lines) + "\n")
    assert code == 0
    answers = out.split("> ")[1:]
    assert len(answers) == len(lines) - 1
    assert answers[0] == answers[5] != answers[3]
    assert "no adapter named 'nobody' is attached" in answers[6]
    assert "/adapter NAME" in answers[7]


def test_chat_keeps_the_conversation_and_ends_at_end_of_input(lorakit, tmp_path, monkeypatch):
    real, asked = generate.stream, []

    def stream(model, tokenizer, ids, **settings):
        asked.append(tokenizer.decode(ids))
        return real(model, tokenizer, ids, **settings)

    monkeypatch.setattr(generate, "stream", stream)
    folder = tiny_lm.save(tmp_path / "chat", chat_template=tiny_lm.CHATML)
    args = [
        "--model",
        folder,
        "--precision",
        "fp32",
        "--temperature",
        "0",
        "--max-new-tokens",
        "4",
        "--system",
        "be brief",
    ]
    code, out, _ = lorakit("chat", *args, stdin="hi\nhi\n/reset\nhi")
    assert code == 0
    answers = [answer.rstrip("\n") for answer in out.split("> ")[1:]]
    alone = "<system>be brief<user>hi<assistant>"
    assert asked == [alone, f"{alone}{answers[0]}</s><user>hi<assistant>", alone]
    assert out.endswith("\n")


def test_a_prompt_that_is_too_long_does_not_end_the_chat(lorakit, model):
    code, out, _ = lorakit("chat", "--model", model, "--max-new-tokens", "4", stdin=f"{'x' * 95}\nshort\n/quit\n")
    assert code == 0
    assert "lorakit: " in out
    assert out.count("> ") == 3


def test_a_gguf_adapter_reads_the_head_count_from_the_model(lorakit, model, trained, tmp_path):
    """llama.cpp permutes the rows of q and k per head, and the file does not store the number of heads."""
    assert lorakit("convert", trained / "adapter", tmp_path / "x.gguf", "--to", "gguf", "--base", model)[0] == 0
    args = [
        "generate",
        "Ada: 3\\n",
        "--model",
        model,
        "--precision",
        "fp32",
        "--max-new-tokens",
        "8",
        "--template",
        "none",
        "--adapter",
    ]
    code, out, error = lorakit(*args, tmp_path / "x.gguf")
    assert (code, error) == (0, "")
    assert out == lorakit(*args, trained / "adapter")[1] != ""


def test_the_folder_of_a_run_stands_for_its_adapter(lorakit, model, trained):
    args = ["generate", "Ada: 3\\n", "--model", model, "--precision", "fp32", "--max-new-tokens", "8", "--adapter"]
    assert lorakit(*args, trained) == lorakit(*args, trained / "adapter")
