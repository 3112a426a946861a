"""`lorakit sweep` and `lorakit train --find-lr` as typed."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import yaml

from lorakit.cli.sweep import spread
from lorakit.errors import ConfigError

FLAGS = ["--steps", "3", "--batch-size", "4", "--precision", "fp32", "--threads", "1", "--validation", "0.2"]


@pytest.fixture(scope="module")
def swept(model, data, tmp_path_factory):
    """A sweep's folder, and what was printed."""
    from lorakit.cli import run

    out = tmp_path_factory.mktemp("swept") / "sweep"
    assert (
        run(
            [
                "sweep",
                "--model",
                model,
                "--data",
                data,
                "--out",
                str(out),
                "--rank",
                "2,4",
                "--lr",
                "1e-3,1e-2",
                "--quiet",
                *FLAGS,
            ]
        )
        == 0
    )
    return out


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("rank", "4,16", [4, 16]),
        ("rank", "[4, 16]", [4, 16]),
        ("rank", 4, 4),
        ("learning_rate", "1e-4,auto", ["1e-4", "auto"]),  # which pydantic reads as a number
        ("learning_rate", "2e-4", "2e-4"),
        ("schedule", "linear, cosine", ["linear", "cosine"]),
        ("data", "a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
        ("targets", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("targets", ["all-linear", ["q_proj"]], ["all-linear", ["q_proj"]]),
    ],
)
def test_commas_in_a_flag_are_values_where_the_setting_holds_one(name, text, value):
    assert spread(name, text) == value


@pytest.mark.parametrize("text", ["4,,8", "4,", "[4, 8"])
def test_a_flag_that_is_no_list_is_an_error(text):
    if text.startswith("["):
        assert spread("rank", text) == ["[4", 8]  # which the setting refuses by name
        return
    with pytest.raises(ConfigError, match="an empty value"):
        spread("rank", text)


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.write_text("")
    assert spread("data", str(path)) == str(path)


def test_the_sweep_leaves_run_folders_a_leaderboard_and_the_winner(swept):
    assert sorted(p.name for p in (swept / "runs").iterdir()) == [
        "rank=2,lr=0.01",
        "rank=2,lr=1e-3",
        "rank=4,lr=0.01",
        "rank=4,lr=1e-3",
    ]
    assert {p.name for p in swept.iterdir()} == {
        "sweep.yaml",
        "position.json",
        "runs",
        "leaderboard.json",
        "plot.png",
        "adapter",
    }
    best = json.loads((swept / "leaderboard.json").read_text())["runs"][0]["name"]
    winner = (swept / "adapter" / "adapter_model.safetensors").read_bytes()
    assert winner == (swept / "runs" / best / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_says_what_came_out_and_what_is_next(lorakit, swept):
    code, out, _ = lorakit("sweep", "--config", swept / "sweep.yaml")
    assert code == 0
    assert "trained together on one base" in out
    assert "finished" in out
    lines = out.splitlines()
    assert lines[-1].startswith("next: lorakit eval TEST.jsonl ")
    assert f"--adapter {swept}/adapter" in lines[-1]
    assert lines[-2].startswith("next: lorakit generate 'your prompt' ")
    assert lines[-3].startswith("winner: rank=")
    assert f"leaderboard: {swept}/leaderboard.json" in lines[-4]
    assert "held-out loss" in out


def test_as_json_it_prints_nothing_else(lorakit, swept):
    code, out, _ = lorakit("sweep", "--config", swept / "sweep.yaml", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["stopped"] is None
    assert [row["place"] for row in told["runs"]] == [1, 2, 3, 4]


def test_a_run_of_the_sweep_is_one_that_train_knows(lorakit, swept):
    code, out, error = lorakit("train", "--config", swept / "runs" / "rank=4,lr=0.01" / "config.yaml")
    assert code == 0, error
    assert "resuming at step 3" in out


def test_a_dry_run_lists_the_runs_and_writes_nothing(lorakit, data, tmp_path):
    args = [
        "sweep",
        "--data",
        data,
        "--out",
        tmp_path / "s",
        "--rank",
        "2,4",
        "--targets",
        "[all-linear, [q_proj]]",
        "--dry-run",
    ]
    code, out, _ = lorakit(*args)
    assert code == 0
    assert out.splitlines()[:4] == [f"rank={r},targets={t}" for r in (2, 4) for t in ("all-linear", "q_proj")]
    assert json.loads(lorakit(*args, "--json")[1])["runs"]["rank=2,targets=q_proj"] == {
        "rank": 2,
        "targets": ["q_proj"],
    }
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rank", "2,4"], "no training data"),
        (["--data", "x", "--rank", "4"], "nothing to sweep"),
        (["--data", "x", "--rank", "2,4,8", "--max-runs", "2"], "3 runs"),
        (["--data", "x", "--rank", "2,x"], "rank"),
        (["--data", "x", "--rank", "2,4", "--precision", "fp32,bf16"], "precision cannot be swept"),
        (["--config", "nowhere.yaml"], "there is no config file"),
    ],
)
def test_a_wrong_call_exits_with_2_and_says_what(lorakit, args, message):
    code, _, error = lorakit("sweep", *args)
    assert (code, message in error) == (2, True), error


def test_a_sweep_that_cannot_start_exits_with_1(lorakit, model, tmp_path):
    code, _, error = lorakit(
        "sweep", "--model", model, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "s", "--rank", "2,4"
    )
    assert code == 1
    assert "no such file" in error


def test_the_config_file_of_train_with_lists_in_it(lorakit, model, data, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model": model, "data": data, "rank": [2, 4], "steps": 1, "out": str(tmp_path / "s"), "threads": 1}
        )
    )
    code, out, error = lorakit("sweep", "--config", path, "--quiet")
    assert code == 0, error
    assert [line.partition(":")[0].partition(" ")[0] for line in out.splitlines()] == ["2", "winner", "next", "next"]
    code, _, error = lorakit("train", "--config", path)
    assert code == 2
    assert "lorakit: --rank: expected a whole number" in error


def test_train_finds_its_learning_rate_when_asked(lorakit, model, data, tmp_path):
    flags = [flag for flag in FLAGS if flag not in ("--steps", "3")]
    code, out, error = lorakit(
        "train",
        "--model",
        model,
        "--data",
        data,
        "--out",
        tmp_path / "r",
        "--find-lr",
        "--steps",
        "4",
        *flags,
        "--sample-tokens",
        "0",
    )
    assert code == 0, error
    assert "learning rate 0." in out
    assert "by held-out loss" in out
    written = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert isinstance(written["learning_rate"], float)
    code, _, error = lorakit("train", "--data", data, "--find-lr", "--lr", "1e-3")
    assert (code, "--find-lr searches for a learning rate" in error) == (2, True)


def test_sweep_help_says_how_lists_are_written(lorakit):
    code, out, _ = lorakit("sweep", "--help")
    assert code == 0
    assert "--rank 4,16" in out
    assert "--dry-run" in out
    assert "--find-lr" not in out


def test_flags_of_tiny_runs_are_flags_of_sweep_too(lorakit, data):
    assert lorakit("sweep", "--data", data, *tiny_lm.FLAGS, "--seed", "0,1", "--dry-run")[0] == 0


def test_variants_and_seeds_in_one_command_and_what_is_said_of_their_differences(lorakit, model, data, tmp_path):
    out = tmp_path / "variants"
    args = ["sweep", "--model", model, "--data", data, "--out", str(out), "--rank", "2", "--lr", "1e-2", *FLAGS]
    code, said, _ = lorakit(*args, "--variant", "lora,loha,rslora", "--seed", "0,1")
    assert code == 0
    assert "over seeds, compared with the best" in said
    assert "best" in said
    board = json.loads((out / "leaderboard.json").read_text())
    assert {each["settings"]["variant"] for each in board["over_seeds"]} == {"lora", "loha", "rslora"}
    assert all(each["seeds"] == 2 for each in board["over_seeds"])
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        f"variant={variant},seed={seed}" for variant in ("loha", "lora", "rslora") for seed in (0, 1)
    ]
    said = lorakit(*args[:5], "--out", str(tmp_path / "one"), *args[7:], "--variant", "lora,loha")[1]
    assert "one seed each: differences may be noise; --seed 0,1,2 says which are larger" in said
