"""Run the demo: fine-tune the embedded model on a slice of E2E NLG, evaluate before and after, save, merge, verify.

The task is from the LoRA paper (Hu et al. 2021, Table 3): write a sentence about a restaurant from a list of its
properties, scored by BLEU against all references of the test set. The slot error rate measures whether the sentence
states what the list does.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases.load import EMBEDDED, embedded_folder
from ..errors import StoppedError

if TYPE_CHECKING:
    from ..train.run import Result

ASSETS = embedded_folder().parent / "e2e"
# The learning rate is twice what `auto` picks: held-out loss 0.986 against 1.027 after 600 steps of 16 rows, rank 16. A
# step of 8 rows takes half the time of one of 16 (383 against 797 ms of CPU time, one thread, fp32), so steps are
# small.
SETTINGS: dict[str, Any] = {
    "rank": 16,
    "steps": 750,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "validation": 0.02,
    "patience": 0,
    "sample_tokens": 0,
    "eval_every": 250,
}
LONGEST_ANSWER = 80  # tokens
ROWS_FILE = "e2e-rows.jsonl"  # the training rows, in the demo's folder


@dataclass(frozen=True)
class Score:
    """One model's scores on the test set. `slot_errors`: percent of the slots. `seconds`: of its training."""

    name: str
    bleu: float
    chrf: float
    rouge_l: float
    slot_errors: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The demo's results. `merged_difference`: largest |Δlogit| between adapter and merged model."""

    scores: list[Score]
    samples: list[dict[str, str]]
    adapter: str
    merged: str
    merged_difference: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    out: Path,
    compare: bool = False,
    rows: int | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    say: Any = print,
    console: Any = None,
) -> Outcome:
    """Run the demo in the folder `out`, resuming an interrupted one.

    compare: also train all weights for as many steps. rows: evaluate on the first `rows` test rows only. steps:
    optimizer steps, SETTINGS' if None. seed: of the training. say: prints a line. Raises StoppedError if training is
    interrupted.
    """
    import torch

    from ..adapter.adapter import Adapter
    from ..bases.device import choose_device, choose_dtype
    from ..bases.load import load_model, load_tokenizer
    from ..checkpoint import merge_checkpoint
    from ..model.activate import activate
    from ..model.attach import attach
    from ..model.detach import detach
    from ..train.config import TrainConfig
    from ..train.progress import Progress
    from ..train.train import train

    began = time.perf_counter()
    tests = [json.loads(line) for line in (ASSETS / "test.jsonl").read_text(encoding="utf8").splitlines()][:rows]
    rows_file = write_rows(out)
    own = SETTINGS | ({"steps": steps} if steps else {})
    config = TrainConfig(**own, seed=seed, data=str(rows_file), out=str(out / "run"))

    say("1. fine-tune: a LoRA adapter for the embedded 5.9-million-parameter model")
    result = train(config, Progress(console))
    trained = _trained(result, "lorakit demo")

    say(f"2. judge: {len(tests)} restaurants, all references, base and adapter")
    device = choose_device().value
    model, tokenizer = load_model(EMBEDDED, choose_dtype("auto", device).value, device), load_tokenizer(EMBEDDED)
    adapter = Adapter.load(trained)
    attach(model, adapter)
    texts: dict[str, list[str]] = {}
    scores = []
    for name, active in (("base", None), ("LoRA", "default")):
        activate(model, active)
        texts[name], score = judge(model, tokenizer, tests, name, result.seconds if active else 0.0)
        scores.append(score)
    if compare:
        say(f"   and full fine-tuning, {result.steps} steps")
        full_config = config.by_method("full").replace(
            learning_rate=SETTINGS["learning_rate"] / 10, out=str(out / "full")
        )
        full = train(full_config, Progress(console))
        full_model = load_model(str(_trained(full, "lorakit demo --compare")), torch.float32, device)
        texts["full"], score = judge(full_model, tokenizer, tests, "full fine-tuning", full.seconds)
        scores.append(score)

    say("3. merge: into the base's checkpoint files, and compare the logits")
    merged = out / "merged"
    # In float32, so that the logits' difference is not dominated by the rounding of the merged weights.
    merge_checkpoint(embedded_folder(), trained, merged, force=True, dtype=torch.float32)
    exact = load_model(EMBEDDED, torch.float32, device)
    attach(exact, adapter)
    difference = _largest_difference(exact, load_model(str(merged), torch.float32, device), tokenizer, tests)
    detach(exact)
    samples = [
        {"prompt": test["prompt"].strip()} | {name: answers[i] for name, answers in texts.items()}
        for i, test in list(enumerate(tests))[:: max(1, len(tests) // 3)][:3]
    ]
    return Outcome(scores, samples, str(trained), str(merged), difference, time.perf_counter() - began)


def _trained(result: Result, command: str) -> Path:
    """Return the folder of a training's result. StoppedError, with the command to resume, if a signal stopped it."""
    if result.adapter is None:
        raise StoppedError(
            f"stopped by {result.stopped} after step {result.step}\n  run {command} again to resume",
            result.stopped or "",
        )
    return result.adapter


def write_rows(out: Path) -> Path:
    """Write the training rows as a data file, which `lorakit train` reads too."""
    from ..io.atomic import write_text
    from .demo_rows import select_rows

    rows = select_rows([json.loads(line) for line in (ASSETS / "train.jsonl").read_text(encoding="utf8").splitlines()])
    path = out / ROWS_FILE
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def judge(
    model: Any, tokenizer: Any, tests: list[dict[str, Any]], name: str, seconds: float
) -> tuple[list[str], Score]:
    """Generate a greedy text for each test row, and score them. `seconds`: of the training, for the Score."""
    from ..generate.generate import generate
    from ..tasks.metrics.texts import score
    from .slots import slot_error_rate

    prompts = [tokenizer(test["prompt"]).input_ids for test in tests]
    texts = [t.strip() for t in generate(model, tokenizer, prompts, max_new_tokens=LONGEST_ANSWER, batch_size=210)]
    metrics = score(texts, [test["references"] for test in tests])
    slots = slot_error_rate([test["prompt"].strip() for test in tests], texts)
    return texts, Score(name, metrics.bleu, metrics.chrf, metrics.rouge_l, slots.rate, seconds)


def _largest_difference(attached: Any, merged: Any, tokenizer: Any, tests: list[dict[str, Any]]) -> float:
    """Return the largest |Δlogit| of two models over the first 8 test prompts."""
    import torch

    largest = 0.0
    with torch.inference_mode():
        for test in tests[:8]:
            ids = torch.tensor([tokenizer(test["prompt"]).input_ids], device=attached.device)
            largest = max(largest, float((attached(ids).logits - merged(ids).logits).abs().max()))
    return largest
