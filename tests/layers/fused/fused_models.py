"""Tiny models that hold modules to be fused, and what the tests do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import fused
from lorakit.layers.updates.lora import LoraFactors

KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite", "Phi3", "Olmo2"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def build(kind: str = "Llama", **config) -> nn.Module:
    """Two layers, four heads that share two keys, weights large enough that every part matters. In training mode."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    made = getattr(transformers, f"{kind}Config")(**sizes | config)
    model = getattr(transformers, f"{kind}ForCausalLM")(made)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # not ones, or zeros
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.train()


def adapted(
    kind: str = "Llama", trained: bool = True, dtype: torch.dtype = torch.float32, config: dict | None = None, **lora
) -> nn.Module:
    targets = PACKED if kind == "Phi3" else ALL
    model = lk.attach(build(kind, **config or {}).to(dtype), lk.LoraConfig(**{"rank": 4, "targets": targets} | lora))
    return tiny.randomise_factors(model, size=0.1) if trained else model


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))


def plain(model: nn.Module) -> nn.Module:
    """A copy in which no module is fused."""
    twin = copy.deepcopy(model)
    fused.release(twin)
    return twin


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{n}.{p}": v for n, m in model.named_modules() if isinstance(m, LoraFactors) for p, v in m.named_parameters()
    }


def gradients(model: nn.Module, ids: Tensor | None = None, seed: int = 5, **inputs) -> dict[str, Tensor]:
    """Of every factor; the loss is the mean over the tokens."""
    ids = tokens() if ids is None else ids
    torch.manual_seed(seed)
    model.zero_grad()
    model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return {n: p.grad.clone() for n, p in factors(model).items() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert list(ours) == list(theirs)
    assert ours
    for name, g in ours.items():
        assert g.any(), name
        off = float((g - theirs[name]).norm() / theirs[name].norm())
        assert off < tolerance, f"{name}: {off:.2g}"


def kinds(model: nn.Module) -> dict[str, str]:
    """The modules that are fused, and as what."""
    return {n: type(m).__bases__[0].__name__ for n, m in model.named_modules() if type(m).__bases__[0] in fused.KINDS}


def counts(calls: dict[str, int], run: Callable[[], object]) -> dict[str, int]:
    """The calls that `run` makes."""
    before = dict(calls)
    run()
    return {n: calls[n] - before[n] for n in calls}
