"""What the examples share: the embedded model and E2E rows (properties to a sentence), and their flags.

{"prompt": "name[The Vaults], eatType[pub], near[Café Adriatic]\n", "completion": "Near Café Adriatic is ..."}
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

import lorakit as lk
from lorakit.bases.load import model_path

END = "<|endoftext|>"


def flags(
    description: str, arguments: Sequence[str] | None, steps: int, rate: float, batch: int = 8
) -> argparse.Namespace:
    """Parse the command line (`arguments` None: that of the process), with a script's own defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="embedded", help="a model folder, a hub id, or embedded")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=rate)
    parser.add_argument("--rows", type=int, default=4000, help="how many rows to train on at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/example", help="folder for checkpoints and the adapter")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0: none")
    parser.add_argument("--resume", help="the checkpoint to resume from, such as runs/example/checkpoint-50")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    torch.manual_seed(options.seed)
    return lk.load_base(options.model), AutoTokenizer.from_pretrained(model_path(options.model))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a trainer that all examples have."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": options.out,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "logging_steps": max(1, options.steps // 20),
        "save_strategy": "steps" if options.save_every else "no",
        "save_steps": options.save_every,
        "report_to": "none",
        "bf16": on_gpu,  # TRL's default is bf16 everywhere; many CPUs only emulate it
        "dataloader_pin_memory": on_gpu,
        "gradient_checkpointing": False,  # TRL's default is True, which is for models that do not fit
    }


def rows(count: int, file: str = "train") -> list[dict[str, str]]:
    """Read the first rows of `train` or `test`. A row of the latter has several sentences; the first is read."""
    lines = (files("lorakit") / "assets" / "e2e" / f"{file}.jsonl").read_text(encoding="utf8").splitlines()
    read = (json.loads(line) for line in lines[:count])
    return [{"prompt": r["prompt"], "completion": r.get("completion") or r["references"][0]} for r in read]


def pairs(count: int, file: str = "train") -> Dataset:
    """Return {"prompt", "chosen", "rejected"}: a row's own sentence, and that of another restaurant."""
    own = rows(count, file)
    others = own[len(own) // 2 :] + own[: len(own) // 2]
    both = zip(own, others, strict=True)
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in both
            if row["prompt"] != other["prompt"]
        ]
    )


def mentioned(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of the properties' values that the sentence has, in their own words."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        values = re.findall(r"\[(.*?)\]", prompt)
        found.append(sum(value.lower() in completion.lower() for value in values) / len(values))
    return found


def report(trainer: Any, *names: str) -> None:
    """Print what a trainer logged in the first and in the last tenth of its steps, on average."""
    for name in names:
        logged = [row[name] for row in trainer.state.log_history if name in row]
        tenth = max(1, len(logged) // 10)
        print(f"{name}: {sum(logged[:tenth]) / tenth:.3f} -> {sum(logged[-tenth:]) / tenth:.3f}")
