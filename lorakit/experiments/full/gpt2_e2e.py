"""GPT-2 medium and large on E2E NLG (Hu et al. 2021, Tables 3 and 11).

Checked against the authors' command (github.com/microsoft/LoRA, examples/NLG/README.md), whose last checkpoint,
step 26,289, is that of 42,061 rows in batches of 8 over 5 epochs.
"""

from __future__ import annotations

from typing import Any

import yaml

WARMUP_STEPS, STEPS = 500, 26_289
_README = """# GPT-2 on E2E NLG with LoRA (Hu et al. 2021, Table 3)

    E2E=/path/to/e2e MODEL=/path/to/gpt2-medium  sh run.sh      # or gpt2-large

MODEL may be a hub id (openai-community/gpt2-medium). E2E is the folder with trainset.csv, devset.csv and
testset_w_refs.csv (columns mr and ref). The run writes `runs/SEED/`; a killed one goes on with the same command. The
paper reports means over three seeds: `SEED=1 sh run.sh`.

LoRA of rank 4, alpha 32, dropout 0.1 on query and value; AdamW, learning rate 2e-4, weight decay 0.01, 500 steps of
warm-up, linear schedule, batch size 8, 5 epochs, no clipping: Table 11, checked against the authors' command.
`texts.jsonl` has the texts of a beam of 10, as there.

What differs:

- **Label smoothing** of 0.1: lorakit has none.
- **Length penalty** (0.9 in the table, 0.8 in the command) and **no repeated 4-grams**: lorakit's beam search has
  neither.
- **Figures**: `lorakit eval` is greedy; its BLEU is sacrebleu's and its ROUGE-L lorakit's, on all references. The
  paper's come from e2e-metrics, which also has NIST, METEOR and CIDEr: give it `texts.jsonl`.
- The loss counts the tokens of the text alone, not those of the meaning representation before it.
"""
_SCRIPT = """#!/bin/sh
# MODEL: a folder or hub id; E2E: the folder with the data.
set -eu
: "${MODEL:?set MODEL to your copy of gpt2-medium}" "${E2E:?set E2E to the folder of the data}"
cd "$(dirname "$0")"
out=runs/${SEED:-0}
lorakit train --config lora.yaml --model "$MODEL" --data "$E2E/trainset.csv" --validation "$E2E/devset.csv" \\
    --seed "${SEED:-0}" --out "$out"
lorakit eval "$E2E/testset_w_refs.csv" --columns prompt=mr,completion=ref --model "$MODEL" --adapter "$out/adapter" \\
    --max-new-tokens 64
lorakit predict "$E2E/testset_w_refs.csv" --columns prompt=mr,completion=ref --model "$MODEL" \\
    --adapter "$out/adapter" --beams 10 --max-new-tokens 64 --out "$out/texts.jsonl" --force
"""


def config() -> dict[str, Any]:
    """Return the settings of the run, but for model, data, seed and folder."""
    return {
        "columns": {"prompt": "mr", "completion": "ref"},
        "targets": ["c_attn"],
        "packed": {"c_attn": [True, False, True]},  # query and value, not key
        "rank": 4,
        "alpha": 32,
        "dropout": 0.1,
        "batch_size": 8,
        "epochs": 5,
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup": round(WARMUP_STEPS / STEPS, 5),
        "weight_decay": 0.01,
        "clip": 0,
        "max_length": 512,
        "patience": 0,
        "keep_best": False,
    }


def files() -> dict[str, str]:
    return {"README.md": _README, "run.sh": _SCRIPT, "lora.yaml": yaml.safe_dump(config(), sort_keys=False)}
