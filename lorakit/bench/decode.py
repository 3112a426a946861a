"""Time lorakit's decoding loop against transformers' `generate`: greedy, same prompts, batches and tokens.

    python -m lorakit.bench.decode [--prompts 210] [--rounds 3] [--adapter lorakit-demo/run/adapter]

The embedded model in float32 on E2E's test prompts, up to 80 new tokens. The base rarely ends its text; with the demo's
adapter rows end after about 40 tokens, at different steps. Interleaved in one process, medians of CPU time, which other
processes disturb less than wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

import torch

import lorakit as lk

from ..bases.load import EMBEDDED, load_model, load_tokenizer
from ..generate.decode import pad_rows
from ..generate.generate import generate
from ..reproduce.demo import ASSETS, LONGEST_ANSWER
from .measure import in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=210)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapter")
    args = parser.parse_args()
    model, tokenizer = load_model(EMBEDDED, torch.float32, torch.device("cpu")), load_tokenizer(EMBEDDED)
    if args.adapter:
        lk.attach(model, lk.Adapter.load(args.adapter))
    lines = (ASSETS / "test.jsonl").read_text(encoding="utf8").splitlines()
    prompts = [
        tokenizer(json.loads(line)["prompt"]).input_ids
        for line in lines[:: max(1, len(lines) // args.prompts)][: args.prompts]
    ]
    prompts.sort(key=len, reverse=True)  # lorakit sorts them so too
    print("rows a batch   lorakit s   transformers s   ratio   equal texts")
    for size in (16, 64, 210):
        texts: dict[str, list[str]] = {}

        def run(name: str, size: int = size, texts: dict[str, list[str]] = texts) -> None:
            texts[name] = SIDES[name](model, tokenizer, prompts, size)

        times = in_turn({name: partial(run, name) for name in SIDES}, args.rounds, 0, time.process_time)
        ours, theirs = times["lorakit"], times["transformers"]
        equal = sum(a == b for a, b in zip(texts["lorakit"], texts["transformers"], strict=True))
        print(
            f"{size:>12}   {ours:>9.2f}   {theirs:>14.2f}   {ours / theirs:>5.2f}   {equal} of {len(prompts)}",
            flush=True,
        )


def by_lorakit(model, tokenizer, prompts, size) -> list[str]:
    """Generate in batches of `size` with lorakit."""
    return generate(model, tokenizer, prompts, max_new_tokens=LONGEST_ANSWER, batch_size=size)


def by_transformers(model, tokenizer, prompts, size) -> list[str]:
    """Generate in batches of `size` with transformers."""
    texts = []
    for start in range(0, len(prompts), size):
        ids, mask = pad_rows(prompts[start : start + size], tokenizer.pad_token_id, on_left=True)
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


SIDES = {"lorakit": by_lorakit, "transformers": by_transformers}


if __name__ == "__main__":
    main()
