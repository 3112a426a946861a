"""Compare the peak memory that `lorakit plan` predicts with that of a process that trains.

Each row is a run of `lorakit train` in its own process, a few steps on rows of full length. Measured is the peak
resident set of the process (VmHWM), including Python, torch and all libraries. Models other than the embedded one are
Llamas with random weights.

Where the base is quantized while loading, the peak is that from the first step on. While it loads, the pages of the
unquantized files are in the process's memory too, which the system can take back at any time.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..bases.device import peak_memory
from ..bases.load import EMBEDDED, embedded_folder
from ..data.read import read_rows
from ..methods import method_of
from ..plan.units import show_bytes
from ..train.config import TrainConfig
from ..train.memory import planner_for

TITLE = (
    "Peak memory that lorakit plan predicts from the base's config, and the peak resident set of a process that runs "
    "lorakit train\n"
    "with these settings for a few steps."
)
STEPS = 4
VOCABULARY = 8192
CHARACTERS = 6  # a token, at most
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Case:
    """A run: a Llama of width `hidden` (0: the embedded model), rows a micro-batch, tokens a row, and settings."""

    hidden: int
    layers: int
    rows: int
    length: int
    settings: dict[str, Any] = field(default_factory=dict)

    def name(self) -> str:
        """The run in words, for the table."""
        parts = [
            f"{self.hidden} x {self.layers} layers" if self.hidden else "embedded",
            self.settings.get("method", "LoRA"),
            "fp32" if self.dtype is torch.float32 else "bf16",
            f"{self.rows} x {self.length}",
        ]
        if "quantize" in self.settings:
            parts[2] += f", {self.settings['quantize']}"
        parts += ["checkpointing"] * self.settings.get("gradient_checkpointing", False)
        parts += ["offloaded"] * self.settings.get("offload_activations", False)
        if "batch_size" in self.settings:
            parts.append(f"of {self.settings['batch_size']}")
        return ", ".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        config = TrainConfig(**{"data": "-", "precision": "bf16"} | self.settings)
        return method_of(config.method).precision(config, torch.device("cpu")).value


OFFLOADED = {"gradient_checkpointing": True, "offload_activations": True}
CASES = (
    Case(0, 0, 8, 512),
    Case(0, 0, 4, 512, {"method": "full", "batch_size": 8}),
    Case(0, 0, 16, 128, {"validation": 0.2}),
    Case(512, 8, 4, 512),
    Case(512, 8, 4, 512, {"precision": "fp32"}),
    Case(512, 8, 4, 512, {"method": "full"}),
    Case(512, 8, 8, 512, {"gradient_checkpointing": True}),
    Case(512, 8, 1, 2048),
    Case(1024, 6, 2, 1024),
    Case(1024, 6, 2, 512, {"precision": "fp32", "rank": 64, "batch_size": 4}),
    # planner.HEAP was fitted to the cases above; the ones below are held out.
    Case(768, 4, 3, 768, {"dropout": 0.1}),
    Case(768, 4, 8, 256, {"precision": "fp32", "targets": ["q_proj", "v_proj"]}),
    Case(768, 4, 2, 512, {"method": "full", "gradient_checkpointing": True}),
    Case(0, 0, 8, 512, {"quantize": "nf4"}),
    Case(1024, 6, 2, 1024, {"quantize": "nf4"}),
    Case(1024, 6, 2, 512, {"quantize": "nf4", "double": False, "precision": "fp32"}),
    Case(1024, 6, 4, 512, {"quantize": "int8"}),
    Case(1024, 6, 4, 512, {"quantize": "torchao-int8"}),
    Case(2048, 4, 1, 512, {"quantize": "nf4"}),
    Case(768, 4, 8, 256, {"quantize": "nf4", "gradient_checkpointing": True}),
    Case(0, 0, 1, 8192, {"rope_scaling": "yarn:32"}),
    Case(0, 0, 1, 8192, {"rope_scaling": "yarn:32", "gradient_checkpointing": True}),
    Case(0, 0, 1, 8192, {"rope_scaling": "yarn:32"} | OFFLOADED),
    Case(0, 0, 1, 16384, {"rope_scaling": "yarn:32", "gradient_checkpointing": True}),
    Case(0, 0, 1, 16384, {"rope_scaling": "yarn:32"} | OFFLOADED),
)
QUICK = (0, 2, 3, 14)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Return a row for each case."""
    cases = [CASES[i] for i in QUICK] if quick else CASES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            config = _config(case, Path(folder), number)
            validation = config.batch_size if config.validation else 0
            planner = planner_for(config, case.dtype, torch.device("cpu"), validation=validation)
            estimate = planner.estimate(case.rows, case.length)
            measured = _measure(config)
            rows.append(
                {
                    "run": case.name(),
                    "predicted": show_bytes(estimate.total),
                    "measured": show_bytes(measured),
                    "error": f"{estimate.total / measured - 1:+.1%}",
                    "at": estimate.peak,
                    "parts": [estimate.parts[part] for part in estimate.parts],
                }
            )
    return rows


def largest_error(rows: list[dict[str, Any]]) -> float:
    """Return the largest error of a prediction, in percent."""
    return max(abs(float(row["error"].rstrip("%"))) for row in rows)


def main() -> None:
    """Print the table and its largest error; `lorakit bench plan` prints the same table."""
    from rich.console import Console

    from .suite import table

    rows = run(quick="--quick" in sys.argv)
    Console(width=140).print(table(rows))
    print(f"largest error: {largest_error(rows):.1f} %")


def _measure(config: TrainConfig) -> int:
    """Train in a fresh process, and return its peak memory in bytes. Raises RuntimeError if it fails."""
    module = __name__ if __name__ != "__main__" else "lorakit.bench.plan"
    command = [sys.executable, "-m", module, "--child", config.model_dump_json()]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"the run failed ({process.returncode}):\n{process.stderr[-2000:]}")
    return int(process.stdout.split()[-1])


def _child(settings: str) -> None:
    from rich.console import Console

    from ..train.progress import Progress
    from ..train.train import train

    config = TrainConfig(**json.loads(settings))
    loaded = _forget_peak if config.quantize else lambda: None  # the panel is the first output, after loading
    train(config, Progress(Console(file=io.StringIO()), before=loaded))
    print(peak_memory())


def _forget_peak() -> None:
    """Let the process's peak begin anew (Linux: man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _config(case: Case, folder: Path, number: int) -> TrainConfig:
    characters = max(12_000, CHARACTERS * case.length)
    data = folder / f"rows-{characters}.jsonl"
    if not data.exists():
        _write_rows(data, characters)
    values = {"micro_batch": case.rows, "batch_size": case.rows, "precision": "bf16", "validation": 0} | case.settings
    return TrainConfig(
        **values,
        model=_model(case, folder),
        data=str(data),
        out=str(folder / f"run{number}"),
        max_length=case.length,
        on_long="cut",
        steps=STEPS,
        sample_tokens=0,
        learning_rate=1e-4,
        memory="unchecked",
        threads=1,
    )


def _write_rows(path: Path, characters: int, rows: int = 40) -> None:
    """Write rows of E2E text that are longer than the case's length, so that all are cut to the same."""
    values = [str(row.values) for row in read_rows(str(embedded_folder().parent / "e2e" / "train.jsonl"), None)]
    text = " ".join(values)
    text *= -(-rows * characters // len(text))
    chunks = [text[i * characters : (i + 1) * characters] for i in range(rows)]
    path.write_text("".join(json.dumps({"text": chunk}) + "\n" for chunk in chunks), encoding="utf8")


def _model(case: Case, folder: Path) -> str:
    """Return the case's base model, written to `folder` unless it is the embedded one."""
    if not case.hidden:
        return EMBEDDED
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"llama-{case.hidden}x{case.layers}-{str(case.dtype).removeprefix('torch.')}"
    if not path.exists():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=case.hidden,
            intermediate_size=case.hidden * 11 // 4,
            num_hidden_layers=case.layers,
            num_attention_heads=case.hidden // 64,
            num_key_value_heads=case.hidden // 64,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model.to(case.dtype).save_pretrained(path)
        for name in TOKENIZER:
            shutil.copy(embedded_folder() / name, path)
    return str(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2])
    else:
        main()
