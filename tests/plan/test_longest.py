"""`lorakit plan --longest`: what fits is what an estimate of that length says, and each way to save memory does."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from lorakit.cli import run
from lorakit.plan.longest import WAYS, Longest, beyond, longest_rows, refusals, table
from lorakit.plan.shell import PlanError
from lorakit.train.config import TrainConfig
from lorakit.train.memory import planner_for

MEMORY = 800_000_000


@pytest.fixture(scope="module")
def planner():
    return planner_for(TrainConfig(data="-", precision="bf16"), torch.bfloat16, torch.device("cpu"), validation=2)


@pytest.fixture(scope="module")
def found(planner):
    return longest_rows([planner], MEMORY)


def test_each_is_the_largest_that_fits(planner, found):
    for row, (way, *how) in zip(found, WAYS, strict=True):
        assert row.way == way
        own = planner.checkpointed(*how)
        assert own.estimate(1, row.tokens).total <= MEMORY
        assert own.estimate(1, int(row.tokens * 1.05)).total > MEMORY


def test_saving_memory_makes_room_for_longer_rows(found):
    kept, checkpointing, offloaded = (row.tokens for row in found)
    assert 512 < kept < checkpointing < offloaded  # the base's positions are no limit here


def test_without_memory_nothing_fits(planner):
    assert [row.tokens for row in longest_rows([planner], 1000)] == [0, 0, 0]


def test_longer_rows_than_the_base_has_positions_for_are_pointed_out():
    rows = [Longest("lora", "", 4000)]
    assert "yarn:4 gives 2,048" in beyond(rows, 512, "embedded")
    assert beyond(rows, 4096, "embedded") is None
    assert beyond(rows, None, "t5") is None


def test_the_command_prints_it(capsys):
    assert run(["plan", "--longest", "--memory", "800MB"]) == 0
    out = capsys.readouterr().out
    assert "gradient_checkpointing" in out
    assert "LoRA, nf4" in out
    assert "--offload-activations" in out
    assert run(["plan", "--longest", "--memory", "800MB", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["longest"]
    assert {row["way"] for row in rows} == {way for way, *_ in WAYS}


def test_what_a_method_cannot_do_is_said_and_the_others_are_shown():
    config = TrainConfig(data="-", precision="bf16", method="prefix")
    found = longest_rows([planner_for(config, torch.bfloat16, torch.device("cpu"))], MEMORY)
    assert [row.refused is None for row in found] == [True, False, False]
    assert found[0].tokens > 512
    console = Console(file=io.StringIO(), width=80)
    console.print(table(found, {"prefix": "prefix"}))
    assert [line.split()[-1] for line in console.file.getvalue().splitlines()[1:]] == [
        f"{found[0].tokens:,}",
        "refused",
        "refused",
    ]
    (line,) = refusals(found)
    assert line.startswith("refused: gradient checkpointing with prefix tuning: transformers drops")


def test_a_step_that_never_runs_is_an_error(monkeypatch, planner):
    def fails(*_):
        raise PlanError("it does not run")

    monkeypatch.setattr(type(planner), "estimate", fails)
    with pytest.raises(PlanError, match="does not run"):
        longest_rows([planner], MEMORY)


def test_unknown_memory_is_an_error(capsys):
    assert run(["plan", "--longest", "--memory", "unchecked"]) == 2
    assert "give it: --memory 24GB" in capsys.readouterr().err
