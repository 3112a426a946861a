"""Time attaching, loading, switching and disabling adapters, and process start-up.

    attach              `lk.attach(model, config)` against `peft.get_peft_model(model, config)`, rank 16 on all linears
    load                `lk.attach(model, lk.Adapter.load(folder), name)` against `model.load_adapter(folder, name)`
    switch, base alone  `lk.activate` against `set_adapter` and `with disable_adapter()`
    start               a fresh process

Garbage collection is off during each measurement: a full collection with torch and transformers loaded takes 0.2 s, and
would be charged to whichever side happens to trigger it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import lorakit as lk

from .measure import seconds
from .suite import Row, need

TITLE = (
    "Milliseconds to attach a fresh adapter (rank 16 on q, k, v, o, gate, up and down of each layer), to load one of "
    "several from disk\n"
    "(rank 8), to switch between them, to disable them and switch back, and to start; lorakit against PEFT, each on "
    "its own model.\n"
    "'times faster': PEFT's time over lorakit's."
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(layers: int, hidden: int, ffn: int, heads: int, device: str = "cpu") -> Any:
    """Return a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def run(quick: bool = False) -> list[Row]:
    """Return the table's rows. Raises MissingPeer without PEFT."""
    need("peft")
    layers, rounds = (8, 1) if quick else (80, 5)
    rows = [
        _attach(f"attach, {layers} layers x 7, width 256", lambda: llama(layers, 256, 704, 4), rounds),
        _attach(
            f"attach, {layers} layers x 7 of a 70B Llama, meta device",
            lambda: llama(layers, 8192, 28672, 64, "meta"),
            rounds,
        ),
    ]
    rows += _several(layers=4 if quick else 32, counts=(1, 2, 3) if quick else (1, 10, 30), repeats=3 if quick else 7)
    return rows + _start(1 if quick else 5)


def _attach(what: str, build: Callable[[], nn.Module], rounds: int) -> Row:
    import peft

    ours, theirs = [], []
    for _ in range(rounds + 1):  # the first round warms up
        model = build()
        ours.append(seconds(lk.attach, model, lk.LoraConfig(rank=16, targets=TARGETS)))
        del model
        model = build()
        theirs.append(seconds(peft.get_peft_model, model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)))
        del model
    return _row(what, median(ours[1:]), median(theirs[1:]))


def _several(layers: int, counts: tuple[int, ...], repeats: int) -> list[Row]:
    """Load many adapters; for each n in `counts` time the n-th load, switching among n, and disabling all."""
    import peft

    def build() -> Any:
        torch.manual_seed(0)  # the same base each time: the file has its fingerprint
        return llama(layers, 256, 704, 4)

    ours, base = build(), build()
    loads, switches, disables = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        lk.capture(lk.attach(build(), lk.LoraConfig(rank=8, targets=TARGETS))).save(Path(folder))
        theirs: Any = None

        def load_ours(name: str) -> None:
            lk.attach(ours, lk.Adapter.load(folder), name=name)

        def load_theirs(name: str) -> None:
            nonlocal theirs
            if theirs is None:
                theirs = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                theirs.load_adapter(folder, adapter_name=name)

        def disable_ours(name: str) -> None:
            lk.activate(ours, None)
            lk.activate(ours, name)

        def disable_theirs(name: str) -> None:
            with theirs.disable_adapter():
                pass

        for n in range(1, max(counts) + 1):
            load_seconds = [seconds(load, f"a{n}") for load in (load_ours, load_theirs)]
            if n not in counts:
                continue
            targets = f"{layers} layers x 7"
            loads.append(_row(f"load adapter {n}, {targets}", *load_seconds))
            names = [f"a{1 + i % n}" for i in range(repeats)]
            one_of = f"one of {n}, {targets}" if n > 1 else f"the only one, {targets}"
            switch_seconds = _each(names, lambda name: lk.activate(ours, name), lambda name: theirs.set_adapter(name))
            switches.append(_row(f"switch to {one_of}", *switch_seconds))
            disables.append(_row(f"base alone and back, {n} attached", *_each(names, disable_ours, disable_theirs)))
    return loads + switches + disables


def _start(rounds: int) -> list[Row]:
    """Time fresh processes."""

    def python(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return time.perf_counter() - began

    pairs = {
        "import": ("import lorakit", "import peft"),
        "import what attaching needs": (
            "from lorakit import LoraConfig, attach",
            "from peft import LoraConfig, get_peft_model",
        ),
        "lorakit --help": ("import lorakit.cli; lorakit.cli.main(['--help'])", None),
        "import torch": ("import torch", None),
        "python alone": ("pass", None),
    }
    rows = []
    for what, (ours, theirs) in pairs.items():
        both = [(python(ours), python(theirs) if theirs else None) for _ in range(rounds)]
        rows.append(
            _row(what, median(a for a, _ in both), median([b for _, b in both if b is not None]) if theirs else None)
        )
    return rows


def plot(rows: list[Row], axes: Any) -> None:
    """Draw the rows that compare with PEFT as bars."""
    compared = [row for row in rows if row["PEFT ms"] is not None][::-1]
    axes.barh([row["what"] for row in compared], [row["times faster"] for row in compared], color="tab:blue")
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("times faster than PEFT")


def _each(names: list[str], ours: Callable[[str], None], theirs: Callable[[str], None]) -> tuple[float, float]:
    """Return both sides' median seconds over the names, interleaved."""
    both = [(seconds(ours, name), seconds(theirs, name)) for name in names]
    return median(a for a, _ in both), median(b for _, b in both)


def _row(what: str, ours: float, theirs: float | None) -> Row:
    return {
        "what": what,
        "lorakit ms": ours * 1e3,
        "PEFT ms": None if theirs is None else theirs * 1e3,
        "times faster": None if theirs is None else theirs / ours,
    }
