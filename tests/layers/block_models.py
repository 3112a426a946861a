"""Tiny models whose blocks are known, and what the tests of the blocks do with them."""

from __future__ import annotations

import copy

import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers import blocks
from lorakit.layers.layer import LoraFactors

KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(kind: str = "Llama", **config) -> nn.Module:
    """Two layers, four heads that share two keys, weights large enough that every part matters. In training mode."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    }  # fmt: skip
    made = getattr(transformers, f"{kind}Config")(**sizes | config)
    return getattr(transformers, f"{kind}ForCausalLM")(made).train()


def adapted(kind: str = "Llama", trained: bool = True, dtype: torch.dtype = torch.float32, config: dict | None = None, **lora) -> nn.Module:
    model = lk.attach(build(kind, **config or {}).to(dtype), lk.LoraConfig(**{"rank": 4, "targets": ALL} | lora))
    return tiny.randomise_factors(model, size=0.1) if trained else model


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))


def plain(model: nn.Module) -> nn.Module:
    """A copy without blocks."""
    twin = copy.deepcopy(model)
    blocks.release(twin)
    return twin


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{n}.{p}": v for n, m in model.named_modules() if isinstance(m, LoraFactors) for p, v in m.named_parameters()}


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
    """The modules that blocks have taken over, and with which."""
    return {n: type(m).__bases__[0].__name__ for n, m in model.named_modules() if isinstance(m, blocks.Block)}
