"""A small text adapter to push, and a comparison of two."""

from __future__ import annotations

import torch

import lorakit as lk


def adapter(base="Qwen/Qwen3-0.6B", **metadata):
    made = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{i}.q_proj": lk.Factors(
            torch.randn(4, 15, generator=made), torch.randn(12, 4, generator=made), 8.0
        )
        for i in range(2)
    }
    config = lk.LoraConfig(rank=4, alpha=8.0, targets=["q_proj"], base=base, task="CAUSAL_LM")
    return lk.Adapter(config, factors, metadata=metadata)


def same(ours, theirs):
    return ours.factors.keys() == theirs.factors.keys() and all(
        torch.equal(f.A, theirs.factors[m].A) and torch.equal(f.B, theirs.factors[m].B) for m, f in ours.factors.items()
    )
