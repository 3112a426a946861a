"""Two processes train what one does: DistributedDataParallel over gloo, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import tiny_lm
import tiny_pictures
import tiny_pipelines
import torch
import yaml
from safetensors.torch import load_file

from lorakit.tasks.task import weight_of
from lorakit.train.config import TrainConfig
from lorakit.train.micro import limit_for, micro_batches
from lorakit.train.progress import Progress
from lorakit.train.resume import trainable
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

COMMAND = [sys.executable, "-c", "from lorakit.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_in_processes(config, tmp_path, count: int) -> list[str]:
    """What `accelerate launch` and torchrun do: one process each, told by the environment which one it is. Their
    outputs.
    """
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    started = [
        subprocess.Popen(
            [*COMMAND, "train", "--config", file],
            env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    told = [process.communicate(timeout=120) for process in started]
    for process, (_, error) in zip(started, told, strict=True):
        assert process.returncode == 0, error
    return [out for out, _ in told]


@pytest.mark.slow
def test_two_processes_end_with_the_parameters_of_one(make_config, tmp_path):
    """19 rows in batches of 6: the last batch of a pass has one row, so that one process has none."""
    config = make_config(batch_size=6, micro_batch=2, steps=8, eval_every=4, save_every=1, keep=9)
    train(config, Progress(quiet=True))
    both = config.replace(out=str(tmp_path / "both"))
    first, second = train_in_processes(both, tmp_path, 2)
    assert "2 processes" in first
    assert "6 = 2 x 2 accumulated x 2" in first
    assert second == ""  # only one of them speaks
    one, two = RunFolder(config.out), RunFolder(both.out)
    assert {row["tokens"] for row in one.rows() if "loss" in row} != {0}
    for ours, theirs in zip(two.rows(), one.rows(), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key

    def off(name: str, step: int):
        return lambda message: f"{name} at step {step}: {message}"

    for step in (1, 4, 8):
        a, b = (load_file(f.checkpoints / f"step-{step}" / "optimizer.safetensors") for f in (one, two))
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-5, msg=off(name, step))
    a, b = (load_file(f.adapter / "adapter_model.safetensors") for f in (one, two))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_two_processes_log_the_rewards_of_all_rows_and_share_ktos_divergence(make_config, tmp_path):
    """13 rows in batches of 6: in a pass's last batch, which has one row, a process has none."""
    rows = [row | {"label": i % 3 > 0} for i, row in enumerate(tiny_lm.rows(13))]
    data = tiny_lm.write_rows(tmp_path / "labelled.jsonl", rows)
    changes = {"batch_size": 6, "steps": 6, "validation": 0, "sample_tokens": 0, "learning_rate": 2e-2}
    config = make_config(task="preference", data=data, **changes)
    train(config, Progress(quiet=True))
    both = config.replace(out=str(tmp_path / "both"))
    train_in_processes(both, tmp_path, 2)
    one, two = RunFolder(config.out), RunFolder(both.out)
    assert len(one.rows()) == 6
    for ours, theirs in zip(two.rows(), one.rows(), strict=True):
        assert ours.keys() == theirs.keys()
        assert "kl" in ours
        for key in ours.keys() - {"seconds"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key


def gradients_of_one_process(config: TrainConfig, count: int) -> dict[str, torch.Tensor]:
    """The gradients of the first step: the sum over the shares of `count` processes, each with its own noise."""
    job = set_up(config)
    job.model.train()
    batch = job.batch(0)
    for rank in range(count):
        torch.manual_seed((config.seed << 32) + rank)
        for part in micro_batches([batch[rank::count]], limit_for([job])):
            losses = job.task.losses(job.model, job.task.collate(part.items, job.base))
            (losses.sum() / weight_of(batch)).backward()
    return {name: p.grad for name, p in trainable(job.model).items() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "changes"),
    [
        (tiny_pipelines.tiny_sd1, {"micro_batch": 1}),
        # The last layer of SDXL's first text encoder is not used, and its rows of two sizes are computed one by one.
        (tiny_pipelines.tiny_sdxl, {"components": ["unet", "text_encoder", "text_encoder_2"]}),
        (
            tiny_pipelines.tiny_sd1,
            {"data": "none", "slider_positive": "a red cat", "slider_negative": "a dog", "slider_steps": 2},
        ),
    ],
    ids=["pictures", "text encoders", "slider"],
)
def test_two_processes_exchange_the_gradients_of_a_pipeline(tmp_path, pipeline, changes):
    """AdamW's average after one step is a tenth of the gradient that each process has after the exchange."""
    model = tmp_path / "pipeline"
    pipeline().save_pretrained(model)
    pictures = tiny_pictures.write_pictures(tmp_path / "pictures", 5, ((16, 16), (24, 16)))
    options = {"batch_size": 5, "steps": 2, "save_every": 1, "keep": 9, "sample_steps": 0, "clip": 1e9, **changes}
    config = tiny_pictures.config(**{"model": model, "data": pictures, "out": tmp_path / "both"} | options)
    train_in_processes(config, tmp_path, 2)
    averages = load_file(RunFolder(config.out).checkpoints / "step-1" / "optimizer.safetensors")
    expected = gradients_of_one_process(config.replace(out=str(tmp_path / "one")), 2)
    assert {name.removesuffix(".exp_avg") for name in averages if name.endswith(".exp_avg")} == expected.keys()
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(averages[f"{name}.exp_avg"] * 10, gradient, rtol=1e-3, atol=1e-6)
