"""A sweep: each adapter ends as it would alone, whatever trains beside it; what is killed, stopped or broken; the
leaderboard.
"""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_lm
import torch
import yaml
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import LorakitError, TrainError
from lorakit.tasks import causal_lm
from lorakit.train import loop, resume, run
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.sweep.sweep import sweep
from lorakit.train.sweep.sweep_config import Sweep, expand
from lorakit.train.sweep.sweep_progress import SweepProgress
from lorakit.train.train import train

QUIET = Progress(quiet=True)
# How far an adapter may be from the same one trained alone, in float32, as a share of the way its weights went: what
# the order of additions in a matrix product of more rows leaves. A weight whose gradient is near zero may differ by
# more, as AdamW's step does not shrink with the gradient: by this share of the learning rate.
TOLERANCE, WORST = 1e-4, 0.05


@pytest.fixture
def make_sweep(make_config, tmp_path):
    """`make_sweep(rank=[2, 4], ...)`: a sweep of short runs into `tmp_path / "sweep"`."""

    def make(**changes):
        out = str(changes.pop("out", tmp_path / "sweep"))
        return expand(make_config(sample_tokens=0).model_dump() | {"out": out} | changes)

    return make


def start(plan):
    return sweep(plan, SweepProgress(quiet=True))


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def assert_as_alone(plan, tmp_path) -> None:
    """Every run of a finished sweep against the same settings trained by `train`."""
    for i, (name, config) in enumerate(plan.runs.items()):
        alone = config.replace(out=str(tmp_path / f"alone-{i}"))
        job = set_up(alone)
        fresh = {n: p.detach().clone() for n, p in resume.trainable(job.model).items()}
        result = loop.Loop([run.Run(job, QUIET)]).go(loop.Interrupt())[0]
        last = resume.steps_in(RunFolder(alone.out).checkpoints)[-1]
        assert resume.steps_in(RunFolder(config.out).checkpoints)[-1] == last == result.step, name
        theirs, ours = (
            load_file(RunFolder(c.out).checkpoints / f"step-{last}" / "trainable.safetensors") for c in (alone, config)
        )
        assert theirs.keys() == ours.keys() == fresh.keys()
        went, off = (torch.cat([(theirs[n] - to[n]).flatten() for n in theirs]) for to in (fresh, ours))
        assert went.abs().max() > 1e-3, name
        assert off.norm() <= TOLERANCE * went.norm(), (name, float(off.norm() / went.norm()))
        assert off.abs().max() <= WORST * config.learning_rate, (name, float(off.abs().max() / config.learning_rate))
        a, b = adapter_of(alone.out), adapter_of(config.out)
        assert a.keys() == b.keys()
        assert max(float((a[n] - b[n]).abs().max()) for n in a) <= WORST * config.learning_rate, name
        for file in ("adapter_config.json", "lorakit.json"):
            told = [json.loads((Path(c.out) / "adapter" / file).read_text()) for c in (alone, config)]
            assert _without_losses(told[0]) == _without_losses(told[1]), (name, file)
        for one, other in zip(RunFolder(alone.out).rows(), RunFolder(config.out).rows(), strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"seconds"}:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=2e-5), (name, key)


def _without_losses(told: dict) -> dict:
    metrics = {k: v for k, v in told.get("metrics", {}).items() if "loss" not in k}
    return {k: metrics if k == "metrics" else v for k, v in told.items()}


# ---- as alone ----


def test_runs_that_differ_in_everything_end_as_alone(make_config, tmp_path, data_file):
    """Ranks, alphas, scales, targets, rates, seeds, batches, schedules, clipping, data of other sizes, and lengths of
    runs.
    """
    few = tiny_lm.write_rows(tmp_path / "few.jsonl", tiny_lm.rows(9))
    differing: list[dict] = [
        {"rank": 2, "steps": 9, "learning_rate": 1e-2, "clip": 0.0},
        {"rank": 8, "alpha": 8.0, "targets": ["q_proj", "down_proj"], "seed": 3, "schedule": "constant", "steps": 6},
        {
            "rank": 3,
            "rslora": True,
            "data": str(few),
            "batch_size": 3,
            "clip": 0.3,
            "epochs": 4.0,
            "steps": None,
            "validation": 0,
        },
        {
            "rank": 5,
            "init": "gaussian",
            "layers": [1],
            "batch_size": 8,
            "weight_decay": 0.1,
            "learning_rate": 2e-3,
            "group_by_length": False,
        },
        {
            "rank": 4,
            "rank_pattern": {"q_proj": 1},
            "alpha_pattern": {"v_proj": 64.0},
            "eval_every": 3,
            "beta2": 0.99,
            "schedule": "cosine",
        },
    ]
    out = tmp_path / "sweep"
    runs = {
        f"r{c['rank']}": make_config(**{"sample_tokens": 0, "out": str(out / "runs" / f"r{c['rank']}")} | c)
        for c in differing
    }
    points = {f"r{c['rank']}": {"rank": c["rank"]} for c in differing}
    plan = Sweep({"out": str(out), "rank": [c["rank"] for c in differing]}, ("rank",), runs, points)
    outcome = start(plan)
    assert len({entry.steps for entry in outcome.entries}) >= 3  # some leave the batch before others
    assert_as_alone(plan, tmp_path)


def test_the_gradients_of_a_step_are_those_alone(make_sweep, tmp_path):
    """AdamW's first average is a tenth of the gradient: nothing here is enlarged by the optimizer."""
    plan = make_sweep(rank=[2, 8], targets=["all-linear", ["v_proj"]], steps=1, clip=0.0)
    start(plan)
    for name, config in plan.runs.items():
        alone = config.replace(out=str(tmp_path / name))
        train(alone, QUIET)
        theirs, ours = (
            load_file(RunFolder(c.out).checkpoints / "step-1" / "optimizer.safetensors") for c in (alone, config)
        )
        gradients = [n for n in theirs if n.endswith(".exp_avg")]
        largest = max(float(theirs[n].abs().max()) for n in gradients)
        assert largest > 1e-3
        assert max(float((theirs[n] - ours[n]).abs().max()) for n in gradients) <= 2e-6 * largest


def test_runs_with_many_tokens_a_step_end_with_the_bits_of_runs_alone(make_sweep, tmp_path):
    """They are computed one by one; what is shared is the base in memory."""
    plan = make_sweep(rank=[2, 4], learning_rate=[2e-3, 1e-2], batch_size=12, micro_batch="auto", steps=3, validation=0)
    start(plan)
    for name, config in plan.runs.items():
        alone = config.replace(out=str(tmp_path / name))
        train(alone, QUIET)
        files = [Path(c.out) / "adapter" / "adapter_model.safetensors" for c in (alone, config)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize("micro_batch", [1, 64])
def test_however_it_is_accumulated(make_sweep, tmp_path, micro_batch):
    plan = make_sweep(rank=[2, 4], steps=3, micro_batch=micro_batch, group_by_length=False)
    start(plan)
    for config in plan.runs.values():
        alone = config.replace(out=config.out + "-alone", micro_batch=2)
        train(alone, QUIET)
        for one, other in zip(RunFolder(alone.out).rows(), RunFolder(config.out).rows(), strict=True):
            for key in one.keys() - {"seconds"}:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=2e-5), key


def test_a_run_that_stops_early_leaves_the_others_as_they_would_be(make_sweep, tmp_path):
    plan = make_sweep(learning_rate=[2e-3, 3.0], steps=9, eval_every=1, patience=1, schedule="constant")
    outcome = start(plan)
    assert {entry.name: entry.stopped for entry in outcome.entries} == {"lr=2e-3": None, "lr=3": "early"}
    assert_as_alone(replace(plan, runs={"lr=2e-3": plan.runs["lr=2e-3"]}), tmp_path)
    stopped = next(entry for entry in outcome.entries if entry.stopped)
    assert stopped.best_step + 1 == stopped.step < 9


def test_packed_projections_and_gradient_checkpointing_end_as_alone(make_sweep, tmp_path):
    folder = str(tiny_lm.save(tmp_path / "gpt2", tiny_lm.gpt2()))
    plan = make_sweep(
        model=folder,
        rank=[2, 4],
        targets=["c_attn", "c_proj"],
        packed={"c_attn": [True, False, True]},
        steps=4,
        gradient_checkpointing=True,
        learning_rate=1e-2,
    )
    start(plan)
    assert_as_alone(plan, tmp_path)


def test_dropout_trains_and_repeats_itself_but_draws_other_masks(make_sweep, tmp_path):
    plans = [make_sweep(rank=[2, 4], dropout=0.3, steps=4, out=tmp_path / out) for out in ("a", "b")]
    for plan in plans:
        start(plan)
    for name in plans[0].runs:
        a, b = (adapter_of(plan.runs[name].out) for plan in plans)
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert (
        RunFolder(plans[0].runs["rank=4"].out).rows()[-1]["held_out_loss"]
        < RunFolder(plans[0].runs["rank=4"].out).rows()[0]["loss"]
    )


def test_the_held_out_rows_do_not_depend_on_the_seed(make_config, tmp_path):
    held = [
        [item.row.number for item in set_up(make_config(seed=seed, out=str(tmp_path / str(seed)))).held_out]
        for seed in (0, 1, 7)
    ]
    assert held[0] == held[1] == held[2]


# ---- killed, interrupted, gone on with ----


def eventful(make_sweep, out):
    """Dropout, unequal lengths, an early stop, accumulation."""
    return make_sweep(
        out=out,
        learning_rate=[5e-3, 3.0],
        steps=None,
        epochs=[1.0, 2.0],
        dropout=0.1,
        eval_every=1,
        save_every=3,
        patience=1,
        schedule="constant",
        micro_batch=5,
    )


def left_by(plan) -> dict:
    """All that a sweep leaves, timing and its own paths apart."""
    found = {}
    for name, config in plan.runs.items():
        folder = RunFolder(config.out)
        steps = resume.steps_in(folder.checkpoints)
        state = json.loads((folder.checkpoints / f"step-{steps[-1]}" / "state.json").read_text())
        found[name] = {
            "adapter": (folder.adapter / "adapter_model.safetensors").read_bytes(),
            "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in folder.rows()],
            "state": {k: v for k, v in state.items() if k != "seconds"},
            "steps": steps,
        }
    out = plan.out
    found["winner"] = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    found["files"] = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return found


def assert_same(ours, theirs) -> None:
    a, b = left_by(ours), left_by(theirs)
    for what in b:
        assert a[what] == b[what], what


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The eventful sweep, not disturbed: made once."""
    made = []

    def get(make_sweep):
        if not made:
            plan = eventful(make_sweep, tmp_path_factory.mktemp("undisturbed") / "sweep")
            outcome = start(plan)
            assert {entry.stopped for entry in outcome.entries} == {None, "early"}
            made.append(plan)
        return made[0]

    return get


def test_an_interrupted_sweep_goes_on_to_the_same_bits(make_sweep, undisturbed, tmp_path, monkeypatch):
    plan = eventful(make_sweep, tmp_path / "sweep")
    real, steps = loop.Loop._step, []

    def stepped(self, going):
        steps.append(1)
        if len(steps) in (2, 5):
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, going)

    monkeypatch.setattr(loop.Loop, "_step", stepped)
    first = start(plan)
    assert (first.stopped, first.winners) == ("SIGINT", {})
    assert not (plan.out / "adapter").exists()
    assert start(plan).stopped == "SIGINT"
    assert start(plan).stopped is None
    assert_same(plan, undisturbed(make_sweep))


@pytest.mark.parametrize("writes", [2, 5, 9])
def test_a_sweep_killed_between_its_runs_checkpoints_ends_with_the_bits_of_one_that_was_not(
    make_sweep, undisturbed, tmp_path, writes
):
    """Some runs have saved and others have not: all go on from where all had."""
    plan = eventful(make_sweep, tmp_path / "sweep")
    pid = os.fork()
    if pid == 0:
        real, done = resume.save, []

        def save(*args, **options):
            done.append(1)
            if len(done) == writes:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        resume.save = save
        try:
            start(plan)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    start(plan)
    assert_same(plan, undisturbed(make_sweep))


def test_a_finished_sweep_started_again_trains_nothing(make_sweep, undisturbed, monkeypatch):
    plan = undisturbed(make_sweep)
    before = left_by(plan)
    monkeypatch.setattr(loop.Loop, "_step", None)
    again = start(plan)
    assert [entry.place for entry in again.entries] == [1, 2, 3, 4]
    assert left_by(plan) == before


def test_a_run_of_a_sweep_can_be_gone_on_with_alone(make_sweep, tmp_path, monkeypatch):
    plan = make_sweep(rank=[2, 4], steps=6)
    real, steps = loop.Loop._step, []

    def stepped(self, going):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, going)

    monkeypatch.setattr(loop.Loop, "_step", stepped)
    start(plan)
    monkeypatch.undo()
    config = plan.runs["rank=4"]
    assert resume.steps_in(RunFolder(config.out).checkpoints)[-1] == 3
    result = train(config, QUIET)
    assert (result.step, result.stopped) == (6, None)
    alone = (RunFolder(config.out).adapter / "adapter_model.safetensors").read_bytes()
    outcome = start(plan)  # which leaves it as it is, and trains the other
    assert {entry.step for entry in outcome.entries} == {6}
    assert (RunFolder(config.out).adapter / "adapter_model.safetensors").read_bytes() == alone
    assert_as_alone(plan, tmp_path)


def test_a_sweep_of_a_release_with_fewer_settings_goes_on(make_sweep):
    plan = make_sweep(rank=[2, 4], steps=2)
    start(plan)
    file = plan.out / "sweep.yaml"
    then = yaml.safe_load(file.read_text()) | {"task": None}  # what it was before tasks had names
    del then["compile"], then["rslora"]
    file.write_text(yaml.safe_dump(then))
    assert len(start(plan).entries) == 2
    with pytest.raises(TrainError, match="rslora: was False, is now True"):
        start(make_sweep(rank=[2, 4], steps=2, rslora=True))


def test_a_sweep_may_come_back_with_more_values_and_not_with_other_settings(make_sweep):
    start(make_sweep(rank=[2, 4], steps=2))
    with pytest.raises(TrainError, match=r"steps: was 2, is now 3"):
        start(make_sweep(rank=[2, 4], steps=3))
    with pytest.raises(TrainError, match=r"rank: was \[2, 4\], is now \[2\]"):
        start(make_sweep(rank=[2], steps=2))
    outcome = start(make_sweep(rank=[2, 4, 8], steps=2))
    assert [entry.name for entry in sorted(outcome.entries, key=lambda e: e.trainable)] == [
        "rank=2",
        "rank=4",
        "rank=8",
    ]


def test_a_folder_with_something_else_in_it_is_refused(make_sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("x")
    with pytest.raises(TrainError, match="contains no sweep"):
        start(make_sweep(rank=[2, 4]))
    assert os.listdir(tmp_path / "sweep") == ["thesis.txt"]
    with pytest.raises(TrainError, match="is a file"):
        start(make_sweep(rank=[2, 4], out=tmp_path / "sweep" / "thesis.txt"))


# ---- one that breaks ----


def breaking(monkeypatch, adapter: str, after: int) -> None:
    """From some step on the named run's losses are not a number."""
    real = loop.Loop._gradients

    def gradients(self, going, batches):
        losses, norms, apart = real(self, going, batches)
        for place, each in enumerate(going):
            if each.job.adapter == adapter and each.step >= after:
                losses[place] = math.nan
                for one in going:  # as if it had met the others' gradients
                    next(iter(one.parameters.values())).grad.fill_(math.nan)
        return losses, norms, apart

    monkeypatch.setattr(loop.Loop, "_gradients", gradients)


def test_a_run_whose_loss_is_not_finite_leaves_and_the_others_end_as_alone(make_sweep, tmp_path, monkeypatch):
    plan = make_sweep(rank=[2, 4, 8], steps=6)
    breaking(monkeypatch, "rank=4", after=3)
    outcome = start(plan)
    last = outcome.entries[-1]
    assert (last.name, last.stopped, last.step, last.place, last.adapter) == ("rank=4", "failed", 3, None, None)
    assert "the loss is nan at step 4" in last.failed
    assert not RunFolder(plan.runs["rank=4"].out).adapter.exists()
    monkeypatch.undo()
    assert_as_alone(replace(plan, runs={n: c for n, c in plan.runs.items() if n != "rank=4"}), tmp_path)
    assert start(plan).entries[-1].failed == last.failed  # also when it is started again


def test_a_run_whose_held_out_loss_is_not_finite_leaves_and_the_others_go_on(make_sweep):
    plan = make_sweep(learning_rate=[1e-3, 1e30], steps=2, eval_every=2, clip=0)
    first, last = start(plan).entries
    assert (first.place, first.step) == (1, 2)
    assert (last.stopped, last.place, last.adapter) == ("failed", None, None)
    assert "the loss is nan" in last.failed
    with pytest.raises(LorakitError, match="the loss is nan"):  # alone, that is the end
        train(plan.runs["lr=1e30"].replace(out=str(plan.out / "alone")), Progress(quiet=True))


def test_a_base_that_breaks_every_run_has_no_winner(make_sweep, tmp_path):
    model = tiny_lm.llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    outcome = start(make_sweep(model=str(tiny_lm.save(tmp_path / "broken", model)), rank=[2, 4], validation=0))
    assert outcome.winners == {}
    assert all("at step 1" in entry.failed for entry in outcome.entries)
    assert outcome.leaderboard.exists()


def test_an_adapted_output_layer_is_refused(make_sweep):
    with pytest.raises(TrainError, match="the targets include the output layer"):
        start(make_sweep(rank=[2, 4], targets=["lm_head"]))


def test_several_processes_are_refused(make_sweep, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="a sweep runs in one process"):
        start(make_sweep(rank=[2, 4]))


# ---- the leaderboard ----


def fake_held_out(monkeypatch, losses: dict[str, float]) -> None:
    monkeypatch.setattr(
        causal_lm,
        "evaluate",
        lambda base, *args: {"loss": losses[next(iter(lk.active(base.model)))], "perplexity": 1.0},
    )


def test_the_lowest_held_out_loss_wins_and_its_adapter_is_kept(make_sweep, monkeypatch):
    plan = make_sweep(rank=[2, 4, 8], steps=2)
    fake_held_out(monkeypatch, {"rank=2": 3.0, "rank=4": 1.0, "rank=8": 2.0})
    outcome = start(plan)
    assert [(entry.name, entry.place, entry.held_out_loss) for entry in outcome.entries] == [
        ("rank=4", 1, 1.0),
        ("rank=8", 2, 2.0),
        ("rank=2", 3, 3.0),
    ]
    assert outcome.criterion == "held-out loss"
    assert outcome.winners == {"": plan.out / "adapter"}
    won = lk.Adapter.load(plan.out / "adapter")
    assert won.rank == 4
    assert won.metadata["recipe"]["rank"] == 4
    told = json.loads(outcome.leaderboard.read_text())
    assert [row["name"] for row in told["runs"]] == ["rank=4", "rank=8", "rank=2"]
    assert told["winners"] == {"": str(plan.out / "adapter")}


def test_without_held_out_rows_the_training_loss_at_the_end_decides_and_is_said(make_sweep):
    outcome = start(make_sweep(learning_rate=[1e-5, 1e-2], steps=8, validation=0))
    assert [entry.name for entry in outcome.entries] == ["lr=0.01", "lr=1e-5"]
    assert outcome.criterion.startswith("the training loss of the last tenth of the steps")
    for entry in outcome.entries:
        assert entry.score == RunFolder(Path(entry.adapter).parent).rows()[-1]["loss"]


def test_runs_on_other_rows_are_ranked_apart_with_a_winner_each(make_sweep, tmp_path, data_file):
    few = tiny_lm.write_rows(tmp_path / "few.jsonl", tiny_lm.rows(12))
    plan = make_sweep(data=[str(data_file), str(few)], rank=[2, 4], steps=2)
    outcome = start(plan)
    assert outcome.winners == {"rows": plan.out / "adapter-rows", "few": plan.out / "adapter-few"}
    assert [(entry.group, entry.place) for entry in outcome.entries] == [
        ("rows", 1),
        ("rows", 2),
        ("few", 1),
        ("few", 2),
    ]
    assert not (plan.out / "adapter").exists()
    assert {plot.name for plot in outcome.plots} == {"plot-rows.png", "plot-few.png"}


def test_runs_on_other_rows_judged_by_the_same_file_are_compared(make_sweep, tmp_path, data_file):
    held = tiny_lm.write_rows(tmp_path / "held.jsonl", tiny_lm.rows(30)[24:])
    few = tiny_lm.write_rows(tmp_path / "few.jsonl", tiny_lm.rows(12))
    outcome = start(make_sweep(data=[str(data_file), str(few)], validation=str(held), max_length=64, steps=2))
    assert [entry.place for entry in outcome.entries] == [1, 2]
    assert list(outcome.winners) == [""]


def test_the_plot_is_a_picture(make_sweep):
    outcome = start(make_sweep(rank=[2, 4], steps=4))
    assert outcome.plots[0].read_bytes()[:4] == b"\x89PNG"
