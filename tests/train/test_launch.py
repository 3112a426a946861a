"""Several processes train together or say why not: by every documented form, with the folder untouched otherwise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lorakit.errors import TrainError
from lorakit.train.launch import asked_for, check_launch, command, peers
from lorakit.train.resume import steps_in
from lorakit.train.run_folder import RunFolder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")


def environment(**changes: str) -> dict[str, str]:
    """The test's own, without what a launcher would have set."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("SLURM")} | changes


def arguments(config, tmp_path) -> list[str]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    return ["-m", "lorakit", "train", "--config", str(file)]


def run(command, **changes: str):
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"PMI_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"WORLD_SIZE": ""}, 1),
    ],
)
def test_how_many_processes_a_launcher_started(variables, count):
    assert asked_for(variables) == count


BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("variables", "world", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, "2 processes were started, and this one runs alone"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 1, r"4 processes(.|\n)*--nproc-per-node 4 -m lorakit train"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, 2, "4 processes were started, and this one runs as one of 2"),
        (BY_ACCELERATE | {"MASTER_ADDR": "127.0.0.1"}, 1, r"asked for several processes and started this one alone"),
        ({"ACCELERATE_USE_FSDP": "true"}, 1, r"ask for FSDP \(ACCELERATE_USE_FSDP\)"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, 2, "ask for DeepSpeed"),
    ],
)
def test_what_is_not_in_force_is_refused_with_the_right_command(variables, world, said):
    with pytest.raises(TrainError, match=said) as caught:
        check_launch(world, variables)
    assert "torchrun --nproc-per-node" in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, 1),
        ({"MASTER_ADDR": "10.0.0.1"}, 1),  # exported by a cluster's scripts, no launcher of ours
        (BY_ACCELERATE, 1),
        (BY_ACCELERATE | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}, 2),
        ({"ACCELERATE_USE_FSDP": "false"}, 1),
    ],
)
def test_what_is_in_force_is_accepted(variables, world):
    check_launch(world, variables)


def test_a_lost_process_is_one_line_with_the_command_that_resumes():
    resume = command(2, "runs/my first")
    assert resume == "torchrun --nproc-per-node 2 -m lorakit train --config 'runs/my first/config.yaml'"
    assert command(1, "runs/x") == "lorakit train --config runs/x/config.yaml"
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5123")
    with pytest.raises(TrainError, match=re.escape(f"this resumes the run: {resume}")), peers(2, resume):
        raise gone
    with pytest.raises(RuntimeError, match="Connection closed"), peers(1, resume):
        raise gone
    with pytest.raises(RuntimeError, match="out of memory"), peers(2, resume):
        raise RuntimeError("CUDA out of memory")


@pytest.mark.slow
def test_plain_torchrun_trains_together_on_a_cpu(make_config, tmp_path):
    config = make_config(steps=2, eval_every=2)
    done = run([*TORCHRUN, *arguments(config, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1, "only one of them speaks"
    assert (RunFolder(config.out).adapter / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        (["--num_processes", "2", "--cpu"], {}, "accelerate launch was asked for several processes"),
        (["--num_processes", "1", "--cpu"], {"ACCELERATE_USE_FSDP": "true"}, "accelerate's settings ask for FSDP"),
    ],
    ids=["two processes", "FSDP"],
)
def test_what_accelerate_launch_does_not_do_on_a_cpu_is_refused(make_config, tmp_path, options, variables, said):
    config = make_config(steps=2)
    done = run([*ACCELERATE, *options, *arguments(config, tmp_path)], **variables)
    assert done.returncode != 0
    assert f"lorakit: {said}" in done.stderr
    assert "torchrun --nproc-per-node" in done.stderr
    assert not (tmp_path / "run").exists(), "the folder is untouched"


@pytest.mark.slow
def test_accelerate_launch_of_one_process_trains(make_config, tmp_path):
    config = make_config(steps=1)
    done = run([*ACCELERATE, "--num_processes", "1", "--cpu", *arguments(config, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (RunFolder(config.out).adapter / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_one_line(make_config, tmp_path, victim):
    """Started without torchrun, whose agent would stop the other one itself."""
    from test_processes import free_port

    config = make_config(steps=4000, eval_every=4000, save_every=5, patience=0, validation=0)
    own = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")
    started = [
        subprocess.Popen(
            [sys.executable, *arguments(config, tmp_path)],
            env=own | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        began = time.monotonic()
        while not steps_in(RunFolder(config.out).checkpoints):
            assert time.monotonic() - began < 120
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
        started[victim].send_signal(signal.SIGKILL)
        _, error = started[1 - victim].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert started[1 - victim].returncode == 1
    assert "Traceback" not in error
    told = [line for line in error.splitlines() if line.startswith("lorakit: another process of this run ended")]
    assert len(told) == 1
    assert f"torchrun --nproc-per-node 2 -m lorakit train --config {config.out}/config.yaml" in error
