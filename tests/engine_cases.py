"""The engines that `contracts/test_engines.py` runs over, on the embedded model, and adapters for them.

scripted   `ScriptedEngine`, which answers by hashes
embedded   `EmbeddedEngine`
vllm       `VllmEngine` with `vllm_stub.py`, which answers by the same hashes
real vllm  the same with a real vLLM, if LORAKIT_VLLM is its command (LORAKIT_VLLM_ARGS: more arguments)
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stub
from scripted_engine import ScriptedEngine

import lorakit as lk
from lorakit.bases.load import embedded_folder, end_tokens, load_model, load_tokenizer
from lorakit.errors import AdapterError
from lorakit.serve.embedded.engine import EmbeddedEngine
from lorakit.serve.embedded.grammar import Grammars
from lorakit.serve.embedded.prefixes import Prefixes
from lorakit.serve.embedded.tiers import Tiers
from lorakit.serve.engine import Engine, Work
from lorakit.serve.vllm.argv import VllmSettings
from lorakit.serve.vllm.cache import ExportCache
from lorakit.serve.vllm.engine import ROWS, VllmEngine

WIDTH, LAYERS, VOCABULARY = 256, 6, 4096  # of the embedded model
STUB = Path(vllm_stub.__file__)


def made(seed: int, rank: int = 4, size: float = 0.3, ending: str = "o_proj", width: int = WIDTH) -> lk.Adapter:
    """An adapter of the embedded model that changes its answers."""
    numbers = torch.Generator().manual_seed(seed)
    updates = {
        f"model.layers.{layer}.self_attn.{ending}": lk.Factors(
            torch.randn(rank, width, generator=numbers) * size, torch.randn(WIDTH, rank, generator=numbers) * size, rank
        )
        for layer in range(LAYERS)
    }
    return lk.Adapter(lk.LoraConfig(rank=rank, alpha=rank, targets=[ending]), updates)


class ValueSource:
    """A source that has its values at hand. `fails`: what reading raises."""

    def __init__(self, label: str, adapter: lk.Adapter, fails: str | None = None):
        self.label = label
        self.adapter = adapter
        self.fails = fails
        self.reads = 0

    def read(self) -> lk.Adapter:
        self.reads += 1
        if self.fails is not None:
            raise AdapterError(self.fails)
        return self.adapter


class Control:
    """The stub's control file and log."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "control.json"
        self.set()

    def set(self, **switches: Any) -> None:
        """Let the stub misbehave in these ways from now on, and in no others."""
        assert not switches.keys() - vllm_stub.SWITCHES.keys()
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(switches))
        beside.replace(self.file)

    def log(self) -> list[dict[str, Any]]:
        lines = Path(f"{self.file}.log").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def bodies(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        return [event["body"] for event in self.log() if event.get("path") == path]

    def engine(self, places: int = 64, **changes: Any) -> VllmEngine:
        """A `VllmEngine` whose vLLM is the stub. It must be started while VLLM_STUB names the control file."""
        settings = VllmSettings("embedded", (sys.executable, str(STUB)), **{"max_rank": 32, "rows": 1, **changes})
        cache = ExportCache(self.file.parent / "cache")
        return VllmEngine(settings, cache=cache, waiting=places - 1, ready_seconds=30)


@dataclass
class Case:
    """An engine of the contract. `engine(places)`: a new one; `pace(engine, seconds)`: slow each token down.

    `checks`: whether it checks that adapters fit the base; `pins`: whether it can pin one; `computes`: whether its
    answers are the model's, in float32.
    """

    engine: Callable[[int], Engine]
    pace: Callable[[Engine, float], None]
    checks: bool = True
    pins: bool = True
    computes: bool = False


def scripted(folder: Path, environment: pytest.MonkeyPatch) -> Case:
    def pace(engine: Any, seconds: float) -> None:
        engine.pace = seconds

    return Case(lambda places: ScriptedEngine(hashed, places=places), pace, checks=False)


def hashed(work: Work) -> list[int]:
    """Answer as the stub does."""
    sampling, ids = work.sampling, list(work.ids)
    if sampling.schema is not None:
        text = json.dumps(vllm_stub.instance(json.loads(sampling.schema)), separators=(",", ":"))
        return vllm_stub.spelled(text, embedded_folder())
    voice = json.dumps(sorted(work.choice))
    salt = str(sampling.seed if sampling.seed is not None else len(ids)) if sampling.temperature else ""
    for _ in range(sampling.max_tokens):
        ids.append(vllm_stub.next_token(voice, ids, VOCABULARY, dict(sampling.logit_bias), salt))
    return ids[len(work.ids) :]


def embedded(folder: Path, environment: pytest.MonkeyPatch) -> Case:
    tokenizer, ends = load_tokenizer("embedded"), end_tokens("embedded")

    def engine(places: int) -> Engine:
        model = load_model("embedded", torch.float32, torch.device("cpu"))
        rows = max(places // 2, 1)
        return EmbeddedEngine(
            model,
            base="embedded",
            tiers=Tiers(model, tokenizer, device=8),
            prefixes=Prefixes(16 << 20),
            grammars=Grammars(tokenizer, ends),
            rows=rows,
            waiting=places - rows,
        )

    return Case(engine, lambda engine, seconds: None, computes=True)


def stubbed(folder: Path, environment: pytest.MonkeyPatch) -> Case:
    control = Control(folder)
    environment.setenv("VLLM_STUB", str(control.file))
    return Case(control.engine, lambda engine, seconds: control.set(token_seconds=seconds), pins=False)


def real(folder: Path, environment: pytest.MonkeyPatch) -> Case:
    command = os.environ.get("LORAKIT_VLLM")
    if not command:
        pytest.skip("set LORAKIT_VLLM to the command of a real vLLM, such as VENV/bin/vllm")
    extra = tuple(shlex.split(os.environ.get("LORAKIT_VLLM_ARGS", "")))
    settings = VllmSettings("embedded", tuple(shlex.split(command)), max_rank=32, extra=extra)
    cache = ExportCache(folder / "cache")

    def engine(places: int) -> Engine:
        return VllmEngine(settings, cache=cache, waiting=places - ROWS)

    return Case(engine, lambda engine, seconds: None, pins=False, computes="float32" in " ".join(extra))


CASES: Mapping[str, Callable[[Path, pytest.MonkeyPatch], Case]] = {
    "scripted": scripted,
    "embedded": embedded,
    "vllm": stubbed,
    "real vllm": real,
}
