"""Memory of a process in which adapters come and go: read from the system, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import asyncio, os, sys
sys.path.insert(0, "tests")
import torch
import lorakit as lk
from tier_sources import Given, made, of_rank, passes, routed
from transformers import LlamaConfig, LlamaForCausalLM
from lorakit.serve.embedded.tiers import Tiers

torch.set_num_threads(1)

def make():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)).eval()

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
small = made(make, targets=linears)

class Fresh(Given):
    def read(self):
        return of_rank(256, self.reads, small)  # 9 MB

model = make()
tiers = Tiers(model, device=4)

async def go():
    await passes(tiers, tiers.load("stays", Given(of_rank(256, 1, small))))
    for n in range(110):
        await passes(tiers, tiers.load(f"k{n}", Fresh(small)))
        routed(model, [f"k{n}", "stays", None])
        await passes(tiers, tiers.unload(f"k{n}"))
        if n == 9:
            before = rss()
    print(before, rss())

asyncio.run(go())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc, and trimmed by glibc")
def test_memory_after_a_hundred_loads_and_unloads_is_within_five_percent_of_that_after_ten():
    root = Path(__file__).parents[3]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    before, after = map(int, child.stdout.split())
    assert after < 1.05 * before, f"{before / 1e6:.0f} MB after ten, {after / 1e6:.0f} MB after 110"
