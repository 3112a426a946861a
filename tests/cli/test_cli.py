"""The command line: help without torch, exit codes, errors, and the steps from a config to an evaluated adapter."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch
import yaml

import lorakit as lk
from lorakit.cli.shared.loading import load
from lorakit.data.dataset import build
from lorakit.data.read import read_rows
from lorakit.data.render import question_ids
from lorakit.train.config import TrainConfig
from lorakit.version import VERSION

VERBS = [
    "demo",
    "init",
    "data",
    "data show",
    "plan",
    "train",
    "sweep",
    "eval",
    "generate",
    "chat",
    "serve",
    "inspect",
    "merge",
    "bench",
    "reproduce",
]
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------- help and version


HELPS = [["--help"], ["--version"], ["train", "--help"], ["serve", "--help"], ["merge", "--help"]]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "fastapi", "uvicorn")


@pytest.mark.parametrize("args", HELPS)
def test_help_and_version_need_no_torch(args):
    code = (
        "import sys, lorakit.cli\n"
        f"code = lorakit.cli.run({args!r})\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert VERSION in done.stdout if args == ["--version"] else "Usage: lorakit" in done.stdout


def test_the_version_is_printed(lorakit):
    assert lorakit("--version") == (0, f"lorakit {VERSION}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help(lorakit, verb):
    code, out, _ = lorakit(*verb.split(), "--help")
    assert code == 0
    assert f"Usage: lorakit {verb}" in out
    assert lorakit(*verb.split(), "-h")[1] == out


def test_the_help_lists_every_command(lorakit):
    asked, wrong = lorakit("--help"), lorakit()
    assert (asked[0], wrong[0]) == (0, 2)
    for told in (asked[1], wrong[2]):
        assert all(f"\n  {verb}" in told for verb in VERBS if " " not in verb)


def test_train_has_a_documented_flag_for_every_setting(lorakit):
    _, out, _ = lorakit("train", "--help")
    words = " ".join(out.split())
    for name, info in TrainConfig.model_fields.items():
        if name != "base":
            assert f"--{name.replace('_', '-')}" in out, name
            assert " ".join(info.description.split())[:40] in words, name


# ------------------------------------------------------------------------------------- usage errors


@pytest.mark.parametrize(
    "args, message",
    [
        (["train", "--data", "x", "--rnk", "8"], "--rank"),
        (["trian"], "train"),
        (["train"], "no training data"),
        (["train", "--data", "x", "--learning-rate", "fast"], "--learning-rate"),
        (["train", "--data", "x", "--precision", "int8"], "precision"),
        (["train", "--config", "nowhere.yaml"], "there is no config file 'nowhere.yaml'"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "hi", "--adapter", "a=x", "--adapter", "a=y"], "two adapters are named 'a'"),
        (["data", "show", "x", "--columns", "prompt"], "--columns: expected NAME=VALUE"),
        (["merge", "base"], "ADAPTER... OUT"),
        (["eval"], "Missing argument '"),
    ],
)
def test_a_usage_error_is_explained_and_exits_with_2(lorakit, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = lorakit(*args)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_config_key_suggests_the_nearest(lorakit, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: x\nlearning_rat: 1\n")
    code, _, error = lorakit("train", "--config", path)
    assert code == 2
    assert "no setting 'learning_rat'; did you mean 'learning_rate'?" in error


def test_a_failed_job_exits_with_1(lorakit, model, data, tmp_path):
    for args, message in [
        (["train", "--model", model, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "r"], "no such file"),
        (["train", "--model", tmp_path / "none", "--data", data, "--out", tmp_path / "r"], "there is no model folder"),
        (["generate", "hi", "--model", model, "--adapter", tmp_path / "none"], "no adapter at"),
        (["inspect", tmp_path / "none"], "no adapter at"),
        (["merge", model, tmp_path / "none", tmp_path / "out"], "no adapter at"),
        (["eval", tmp_path / "none.jsonl", "--model", model], "no such file"),
    ]:
        code, out, error = lorakit(*args)
        assert (code, out) == (1, ""), args
        assert error.startswith("lorakit: ")
        assert message in error
        assert "Traceback" not in error


def test_an_unwritable_folder_gives_no_traceback(lorakit, model, data):
    code, _, error = lorakit(
        "train", "--model", model, "--data", data, "--out", "/dev/null/run", "--quiet", *tiny_lm.FLAGS
    )
    assert code == 1
    assert error.startswith("lorakit: ")
    assert "/dev/null" in error


def test_an_unknown_target_fails_with_the_nearest_name(lorakit, model, data, tmp_path):
    code, _, error = lorakit(
        "train", "--model", model, "--data", data, "--out", tmp_path / "r", "--targets", "q_pro,v_proj", *tiny_lm.FLAGS
    )
    assert code == 1
    assert "did you mean 'q_proj'?" in error


# ------------------------------------------------------------------------------------- init and settings


def test_the_config_from_init_reads_back_as_the_defaults(lorakit, tmp_path):
    path = tmp_path / "lorakit.yaml"
    code, out, _ = lorakit("init", path, "--data", "my rows.jsonl", "--model", "some/model")
    assert code == 0
    assert out.splitlines()[-1].startswith("next: lorakit data show 'my rows.jsonl'")
    assert TrainConfig(**yaml.safe_load(path.read_text())) == TrainConfig(data="my rows.jsonl", model="some/model")
    before = path.read_text()
    code, _, error = lorakit("init", path)
    assert code == 2
    assert "--force" in error
    assert path.read_text() == before
    assert lorakit("init", path, "--force")[0] == 0
    assert path.read_text() != before


def test_train_runs_the_config_from_init_and_its_own(lorakit, model, data, tmp_path):
    path = tmp_path / "lorakit.yaml"
    lorakit("init", path, "--data", data, "--model", model)
    out = tmp_path / "run"
    assert lorakit("train", "--config", path, "--out", out, "--quiet", *tiny_lm.FLAGS)[0] == 0
    written = TrainConfig(**yaml.safe_load((out / "config.yaml").read_text()))
    assert (written.rank, written.out, written.data, written.clip) == (4, str(out), data, 1.0)
    code, told, error = lorakit("train", "--config", out / "config.yaml")
    assert code == 0, error
    assert "resuming at step 6" in told


def test_flags_override_the_config_file(lorakit, model, data, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump({"data": "elsewhere.jsonl", "rank": 2, "dropout": 0.5, "steps": 1, "group_by_length": False})
    )
    args = [
        "--config",
        path,
        "--data",
        data,
        "--model",
        model,
        "--out",
        tmp_path / "r",
        "--rank",
        "4",
        "--threads",
        "1",
    ]
    code, _, error = lorakit("train", *args, "--group-by-length", "--quiet", "--sample-tokens", "0")
    assert code == 0, error
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (config["rank"], config["dropout"], config["steps"], config["group_by_length"]) == (4, 0.5, 1, True)


def test_resuming_with_another_rank_shows_the_difference(lorakit, trained):
    code, _, error = lorakit("train", "--config", trained / "config.yaml", "--rank", "8")
    assert code == 1
    assert "rank: was 4, is now 8" in error


# ------------------------------------------------------------------------------------- the whole way


def test_train_prints_its_result_and_the_next_command(lorakit, model, data, tmp_path):
    out = tmp_path / "a run"
    code, told, _ = lorakit("train", "--model", model, "--data", data, "--out", out, *tiny_lm.FLAGS)
    assert code == 0
    *_, result, use, judge = told.splitlines()
    assert result.startswith("6 steps in ")
    assert result.endswith(f"report: {out}/report.html; adapter: {out}/adapter")
    where = f"--model {model} --adapter '{out}/adapter' --precision fp32"
    assert use == f"next: lorakit generate 'your prompt' {where}"
    assert judge == f"next: lorakit eval TEST.jsonl {where}   # rows it was not trained on"


def test_the_next_commands_keep_the_options_of_the_call(lorakit, model, data, tmp_path):
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(Path(data).read_text().replace('"prompt"', '"question"'))
    options = ["--columns", "prompt=question", "--validation", renamed]
    code, told, err = lorakit(
        "train", "--model", model, "--data", renamed, "--out", tmp_path / "run", *tiny_lm.FLAGS, *options
    )
    assert code == 0, err
    judge = told.splitlines()[-1]
    where = f"--model {model} --adapter {tmp_path}/run/adapter"
    assert judge == f"next: lorakit eval {renamed} {where} --precision fp32 --columns prompt=question"
    assert lorakit(*shlex.split(judge)[2:], "--no-text")[0] == 0
    code, told, err = lorakit(
        "data", "show", renamed, "--model", model, "--columns", "prompt=question", "--on-long", "cut"
    )
    expected = f"next: lorakit train --data {renamed} --model {model} --columns prompt=question --on-long cut"
    assert (code, told.splitlines()[-1]) == (0, expected), err


def test_train_as_json_prints_only_json(lorakit, trained):
    code, out, _ = lorakit("train", "--config", trained / "config.yaml", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["step"], told["steps"], told["stopped"], told["adapter"]) == (6, 6, None, f"{trained}/adapter")


def test_full_fine_tuning_writes_a_model_not_an_adapter(lorakit, model, data, tmp_path):
    out = tmp_path / "full"
    code, told, _ = lorakit(
        "train", "--model", model, "--data", data, "--out", out, "--method", "full", *tiny_lm.WITHOUT_RANK
    )
    assert code == 0
    *_, use, judge = told.splitlines()
    assert use == f"next: lorakit chat --model {out}/model --precision fp32"
    assert judge == f"next: lorakit eval TEST.jsonl --model {out}/model --precision fp32   # rows it was not trained on"
    assert lorakit("eval", data, "--model", out / "model", "--no-text")[0] == 0


def test_eval_compares_base_and_adapter(lorakit, model, data, trained):
    args = [
        "eval",
        data,
        "--model",
        model,
        "--adapter",
        f"mine={trained}/adapter",
        "--precision",
        "fp32",
        "--max-new-tokens",
        "4",
    ]
    code, out, _ = lorakit(*args, "--json", "--limit", "6")
    base, mine = json.loads(out)["results"]
    assert code == 0
    assert (base["adapter"], mine["adapter"]) == (None, "mine")
    assert base["rows"] == mine["rows"] == 6
    assert mine["loss"] < base["loss"] - 0.2
    assert 0 <= mine["scores"]["bleu"] <= 100
    code, out, _ = lorakit(*args, "--samples", "1")
    assert code == 0
    assert "perplexity" in out
    assert "BLEU" in out
    assert (
        out.splitlines()[-1] == f"next: lorakit chat --model {model} --adapter mine={trained}/adapter --precision fp32"
    )
    code, out, _ = lorakit("eval", data, "--model", model, "--no-text")
    assert code == 0
    assert "BLEU" not in out
    assert out.splitlines()[-1] == f"next: lorakit train --data YOUR.jsonl --model {model}"


def test_generate_with_and_without_the_adapter(lorakit, model, trained):
    args = ["--model", model, "--precision", "fp32", "--max-new-tokens", "8"]
    code, out, _ = lorakit("generate", r"Ada: 3\n", *args, "--json")
    base = json.loads(out)
    assert code == 0
    assert base["prompt"] == "Ada: 3\n"
    tuned = json.loads(lorakit("generate", r"Ada: 3\n", *args, "--adapter", f"{trained}/adapter", "--json")[1])
    assert tuned["text"] != base["text"]
    assert lorakit("generate", *args, stdin="Ada: 3\n")[1] == base["text"] + "\n"
    sampled = [lorakit("generate", "Ada", *args, "--temperature", "2", "--seed", seed)[1] for seed in "778"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_uses_the_chat_template_if_there_is_one(lorakit, model, tmp_path):
    code, _, error = lorakit("generate", "hi", "--model", model, "--template", "chat")
    assert code == 2
    assert "no chat template" in error
    folder = tiny_lm.save(tmp_path / "chat", chat_template=tiny_lm.CHATML)
    args = ["--model", folder, "--precision", "fp32", "--max-new-tokens", "4", "--json"]
    texts = [
        json.loads(lorakit("generate", p, *args, "--template", t)[1])["text"]
        for p, t in [("hi", "chat"), ("hi", "auto"), ("<user>hi<assistant>", "none")]
    ]
    assert texts[0] == texts[1] == texts[2]


def test_prompts_are_formatted_as_in_training(lorakit, model, tmp_path):
    turns = [[{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yo"}] for i in range(8)]
    rows = tiny_lm.write_rows(tmp_path / "chats.jsonl", [{"messages": t} for t in turns])
    args = ["--model", model, "--precision", "fp32"]
    assert (
        lorakit(
            "train", *args, "--data", rows, "--out", tmp_path / "run", "--steps", "2", "--validation", "0", "--quiet"
        )[0]
        == 0
    )
    loaded = load(model, [str(tmp_path / "run/adapter")], "fp32")
    assert loaded.style_for("auto") == "plain"
    assert load(model, [], "fp32").style_for("auto") == "none"
    trained_on = build(read_rows(rows), loaded.tokenizer).items[3]
    asked = question_ids("hi 3", loaded.tokenizer, loaded.style_for("auto"))
    assert trained_on.ids[: len(asked)] == asked
    assert not any(trained_on.trained[: len(asked)])
    assert all(trained_on.trained[len(asked) :])


def test_a_base_without_the_adapters_chat_template_is_an_error(lorakit, model, trained, tmp_path):
    adapter = lk.Adapter.load(f"{trained}/adapter")
    data = {**adapter.metadata["data"], "template": "chat"}
    dataclasses.replace(adapter, metadata={**adapter.metadata, "data": data}).save(tmp_path / "chat")
    args = [
        "generate",
        "hi",
        "--model",
        model,
        "--precision",
        "fp32",
        "--max-new-tokens",
        "2",
        "--adapter",
        tmp_path / "chat",
    ]
    code, _, error = lorakit(*args)
    assert code == 2
    assert "was trained with a chat template" in error
    assert lorakit(*args, "--template", "none")[0] == 0


def test_inspect_describes_adapters_and_models(lorakit, model, trained):
    code, out, _ = lorakit("inspect", trained / "adapter")
    assert code == 0
    assert "rank 4, 3,712 parameters in 14 modules" in out
    assert model in out
    assert "q_proj" in out
    told = json.loads(lorakit("inspect", trained / "adapter", "--json")[1])
    assert len(told["modules"]) == 14
    assert told["base"] == model
    code, out, _ = lorakit("inspect", model, "--modules")
    assert code == 0
    assert "* model.layers.1.mlp.down_proj" in out
    assert json.loads(lorakit("inspect", model, "--json")[1])["architecture"] == "LlamaForCausalLM"


def test_a_closed_pipe_gives_no_traceback(model, data):
    command = (
        f"{sys.executable} -c 'from lorakit.cli import main; main()' data show {data} --model {model} --rows 24 | true"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
