"""What a run shows: the start panel, plain lines without a terminal, a bar on one."""

from __future__ import annotations

import io
import re

import pytest
import tiny_lm
import torch
from rich.console import Console

from lorakit.train import progress as progress_module
from lorakit.train.bar import fitting
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train


def shown(config, terminal: bool = False, width: int = 400) -> str:
    """What training prints."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, force_interactive=terminal)
    train(config, Progress(console))
    return console.file.getvalue()


def facts(text: str) -> dict[str, str]:
    """The panel's lines by name."""
    lines = [line.strip("│ \n") for line in text.splitlines() if line.startswith("│")]
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)


def test_the_panel_says_what_was_chosen_and_why(make_config):
    config = make_config(steps=2, batch_size=6, micro_batch=4, learning_rate="auto", precision="auto", dropout=0.1)
    told = facts(shown(config))
    dtype = "bfloat16" if "bfloat16" in told["model"] else "float32"
    assert (
        told["model"].startswith(f"{config.model}, 32,032 parameters, {dtype} (the CPU ") or torch.cuda.is_available()
    )
    assert told["device"] == "cpu (no accelerator found), 1 process, 1 thread" or torch.cuda.is_available()
    assert told["adapter"] == "rank 4, alpha 32, 3,712 trainable (10 %)"  # 3,712 of 35,744
    assert told["data"].endswith("rows.jsonl: 19 rows to train on, 5 held out, shape prompt/completion")
    assert told["length"].startswith("at most 48 tokens (99th percentile of 24 rows is 44 tokens")
    assert told["batch"] == "6 = 4 x 2 accumulated x 1 (as given)"
    assert told["steps"] == "2 (0.5 passes over the data)"
    assert re.fullmatch(
        r"0\.0\d+ \(for a model of width 32, x1.5 for under 100 steps\), linear, warm-up 3%", told["learning rate"]
    )
    assert told["folder"] == config.out


def test_full_fine_tuning_says_that_all_is_trained(make_config):
    told = facts(shown(make_config(steps=1, method="full")))
    assert told["adapter"] == "none: full fine-tuning, 32,032 trainable (100 %)"
    assert "float32 (full fine-tuning keeps no other copy of the weights)" in told["model"]


def test_the_panel_counts_the_experts_among_the_targets(make_config, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    values = tiny_lm.llama().config.to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    values = {k: v for k, v in values.items() if k not in ("architectures", "model_type", "transformers_version")}
    folder = tiny_lm.save(tmp_path / "experts", MixtralForCausalLM(MixtralConfig(**values)))
    told = facts(shown(make_config(model=folder, steps=1)))
    assert re.match(r"\d+ weights of 4 experts \(down_proj, gate_up_proj\), [\d,]+ parameters", told["experts"])
    assert "not reached" not in told
    dense = facts(shown(make_config(steps=1, out=str(tmp_path / "dense"))))
    assert "experts" not in dense
    left_out = facts(shown(make_config(model=folder, steps=1, exclude=["experts"], out=str(tmp_path / "without"))))
    assert "experts" not in left_out
    kind = facts(shown(make_config(model=folder, steps=1, variant="dora", out=str(tmp_path / "dora"))))
    assert "experts" not in kind
    assert "experts can have plain LoRA only, not 'dora'" in kind["left out"]
    assert "left out" not in told


def test_what_the_length_limit_left_out_is_counted(make_config):
    told = facts(shown(make_config(steps=1, max_length=40, on_long="drop")))
    dropped = sum(len(row["prompt"]) + len(row["completion"]) + 1 > 40 for row in tiny_lm.rows())
    assert dropped > 0
    assert re.fullmatch(
        rf"at most 40 tokens \(as given\), {dropped} dropped \([\d.]+ % of the tokens\)", told["length"]
    )


def test_a_resumed_run_says_where_it_goes_on(make_config):
    config = make_config(steps=2)
    shown(config)
    assert facts(shown(config))["folder"].endswith("resuming at step 2")


def test_without_a_terminal_there_are_plain_lines(make_config):
    text = shown(make_config(steps=4, eval_every=2))
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line.split()[1] for line in lines if re.match(r"step +\d+/", line)] == ["1/4", "2/4", "3/4", "4/4"]
    assert re.search(
        r"step +1/4  loss \d+\.\d{3} \(average \d+\.\d{3}\)  [\d,]+ trained tokens/s  [\d.]+ GiB.*  \d+ s left", text
    )
    assert len(re.findall(r"held-out loss \d+\.\d{4}  perplexity \d+\.\d\d", text)) == 2
    assert text.count("tuned  ") == 2


def test_a_long_run_prints_about_twenty_lines(make_config):
    text = shown(make_config(steps=60, sample_tokens=0, validation=0))
    assert len(re.findall(r"^step +\d+/60", text, flags=re.M)) == 20


def test_a_terminal_gets_a_bar(make_config):
    text = shown(make_config(steps=3), terminal=True)
    assert "\x1b[" in text
    assert "3/3" in text
    assert "held-out loss" in text
    assert "trained tokens/s" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_step_and_time_are_on_one_line_at_any_width(make_config, width):
    text = shown(make_config(steps=3), terminal=True, width=width)
    lines = [line for line in re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", text).splitlines() if line.startswith("step ")]
    last = [line for line in lines if " left " in line][-1]
    assert re.search(r"3/3 .*\d:\d\d:\d\d left [\d-]:[\d-]+:[\d-]+$", last.rstrip())
    assert "…" not in last
    assert ("loss" in last) == (width >= 60)


def test_facts_that_do_not_fit_are_left_out_from_the_end():
    assert fitting(["loss 1.0", "5 tokens/s", "1 GiB"], 20) == "loss 1.0  5 tokens/s"
    assert fitting(["loss 1.0", "5 tokens/s", "1 GiB"], 7) == ""


def test_the_bases_answer_is_shown_once():
    console = Console(file=io.StringIO(), width=60)
    progress = Progress(console)
    progress.sample("a prompt " * 12, "base", "first")
    progress.sample("a prompt " * 12, "base", "second")
    progress.sample("another", "base", "third")
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines if line[11:12].strip()] == ["prompt", "base", "tuned"] * 1 + [
        "tuned",
        "prompt",
        "base",
        "tuned",
    ]
    assert re.match(r" {18}\w", lines[1])  # wrapped below its own text


def test_a_narrow_terminal_does_not_break_it(make_config):
    assert "\x1b[?25h" in shown(make_config(steps=3), terminal=True, width=20)  # it ended, and gave the cursor back


def test_the_bar_is_closed_when_the_run_fails(make_config, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress(console)
    monkeypatch.setattr("lorakit.tasks.causal_lm.losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(make_config(steps=3), progress)
    assert progress._bar is None
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_quiet_prints_nothing(make_config, capsys):
    train(make_config(steps=2), Progress(quiet=True))
    assert capsys.readouterr().out == ""


def test_square_brackets_in_samples_are_text_not_markup():
    console = Console(file=io.StringIO(), width=200)
    Progress(console).sample("name[Blue Spice], [bold]x[/bold]", "[red]", "[/]")
    text = console.file.getvalue()
    assert "name[Blue Spice], [bold]x[/bold]" in text
    assert "[/]" in text


def test_a_perplexity_beyond_floating_point_is_said_in_words():
    console = Console(file=io.StringIO(), width=200)
    Progress(console).row({"step": 1, "held_out_loss": 900.0, "held_out_perplexity": None})
    assert "beyond floating point" in console.file.getvalue()


def test_long_texts_are_shortened():
    assert progress_module._short("a  b\n" * 100) == ("a b " * 100)[:109] + "…"
    assert progress_module._short(" short\n") == "short"


def test_the_loss_shown_is_the_steps_own_and_the_average_survives_a_resume(make_config, monkeypatch):
    config = make_config(steps=8, eval_every=4, sample_tokens=0, learning_rate=0.02)

    def losses(text):
        found = re.findall(r"step +(\d+)/8  loss (\d+\.\d{3}) \(average (\d+\.\d{3})\)", text)
        return {int(step): (float(loss), float(average)) for step, loss, average in found}

    interrupted = [1] * 5
    monkeypatch.setattr(
        "lorakit.train.loop.Loop._agreed", lambda *_: interrupted.pop() and None if len(interrupted) > 1 else "SIGINT"
    )
    first = losses(shown(config))
    monkeypatch.undo()
    both = first | losses(shown(config))
    assert 1 < len(first) < len(both) == 8
    logged = {row["step"]: row["loss"] for row in RunFolder(config.out).rows() if "loss" in row}
    weighted, weights = 0.0, 0.0
    for step in range(1, 9):
        weighted, weights = 0.9 * weighted + logged[step], 0.9 * weights + 1
        assert both[step] == (pytest.approx(logged[step], abs=6e-4), pytest.approx(weighted / weights, abs=6e-4)), step
