"""GPT-3's shape and the paper's settings for it (Hu et al. 2021, Tables 4 and 12), to plan a run without weights.

GPT-3's weights are not public. Its shape is (Brown et al. 2020, Table 2.1); a user with a model of this size changes
the config's sizes. The hyperparameters are from Table 12 as we remember it: there is no script to check them against.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

LENGTHS = {"WikiSQL": 384, "MNLI": 768, "SAMSum": 2048}  # tokens
_README = """# GPT-3 with LoRA (Hu et al. 2021, Table 4)

    sh run.sh      # memory of full fine-tuning and of LoRA, from the shape alone

`gpt3/config.json` is GPT-2's architecture with GPT-3's sizes: 96 layers of width 12,288, 96 heads, 2,048 positions. Its
weights are not public, so nothing is trained here: `lorakit plan` counts what a run would need. With a model of your
own, `lorakit train --config lora.yaml --model MODEL --data FILE` trains with the paper's settings: rank 8 on query and
value, AdamW, learning rate 2e-4, weight decay 0.1, batch size 128, 2 epochs, linear schedule, 250,000 tokens of
warm-up (here a share of the steps, 3 %).

Those are from Table 12 as we remember it; there is no script of the authors to check them against. The lengths of
Table 4's tasks are 384 (WikiSQL), 768 (MNLI) and 2,048 tokens (SAMSum).

`lorakit reproduce gpt3` counts the trained parameters of Table 4.
"""
_SCRIPT = """#!/bin/sh
set -eu
cd "$(dirname "$0")"
LINES
"""


def shape() -> dict[str, Any]:
    """Return the config of a GPT-2 with GPT-3's sizes."""
    sizes = {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 50257}
    ends = {"bos_token_id": 50256, "eos_token_id": 50256}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **ends, "tie_word_embeddings": True}


def config() -> dict[str, Any]:
    """Return the settings of a run, but for model, data and folder."""
    return {
        "targets": ["c_attn"],
        "packed": {"c_attn": [True, False, True]},
        "rank": 8,
        "alpha": 8,
        "batch_size": 128,
        "micro_batch": 1,
        "epochs": 2,
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup": 0.03,
        "weight_decay": 0.1,
        "precision": "bf16",
        "gradient_checkpointing": True,
    }


def files() -> dict[str, str]:
    plan = "lorakit plan --config lora.yaml --model gpt3 --device cuda --memory 1.2TB --max-length"
    lines = [f"{plan} {length}  # {task}" for task, length in LENGTHS.items()]
    return {
        "README.md": _README,
        "run.sh": _SCRIPT.replace("LINES", "\n".join(lines)),
        "lora.yaml": yaml.safe_dump(config(), sort_keys=False),
        "gpt3/config.json": json.dumps(shape(), indent=2) + "\n",
    }
