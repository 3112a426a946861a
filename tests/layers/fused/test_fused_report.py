"""Models of many kinds: what of each is fused, and that gradients are those of a copy in which nothing is, with dropout
too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from fused_models import assert_same_gradients, build, factors, plain, tokens
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import fused

IDS = tokens(2, 7)
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, pad_token_id=0)
    )


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, pad_token_id=0))


def t5(act: str, dropout: float) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=tiny.VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=dropout,
        feed_forward_proj=f"gated-{act}",
    )
    return T5ForConditionalGeneration(config)


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        dropout=0.0,
    )


def of_tokens(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def of_both(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits


def of_image(model: nn.Module) -> Tensor:
    made = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 4, 8, 8, generator=made), torch.randn(2, 5, 12, generator=made)
    time = torch.tensor([3, 500])
    if "DiT" in type(model).__name__:
        return model(image, timestep=time, class_labels=torch.tensor([1, 2])).sample
    return model(image, time, text).sample


NO_INTERFACE = ("attention's backward", "", 1, "does not support transformers' attention")
IN_32_BITS = ("attention's backward", "", 1, "only for 16 bits")
# Kind, class, how many, and a part of why they are not fused.
Row = tuple[str, str, int, str | None]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], list[Row]]] = {
    "Llama": (
        build,
        of_tokens,
        [
            (fused.LINEAR, "Linear", 14, None),
            ("RMSNorm", "LlamaRMSNorm", 5, None),
            ("gated MLP", "LlamaMLP", 2, None),
            IN_32_BITS,
        ],
    ),
    "Qwen3": (
        lambda: build("Qwen3"),
        of_tokens,
        [
            (fused.LINEAR, "Linear", 14, None),
            ("RMSNorm", "Qwen3RMSNorm", 9, None),
            ("gated MLP", "Qwen3MLP", 2, None),
            IN_32_BITS,
        ],
    ),
    "Gemma 3": (
        gemma3,
        of_tokens,
        [
            (fused.LINEAR, "Linear", 14, None),
            ("RMSNorm", "Gemma3RMSNorm", 13, None),
            ("gated MLP", "Gemma3MLP", 2, None),
            IN_32_BITS,
        ],
    ),
    "Phi-3": (
        lambda: build("Phi3"),
        of_tokens,
        [
            (fused.LINEAR, "Linear", 8, None),
            ("RMSNorm", "Phi3RMSNorm", 5, None),
            ("gated MLP", "Phi3MLP", 2, None),
            IN_32_BITS,
        ],
    ),
    "GPT-NeoX": (gpt_neox, of_tokens, [(fused.LINEAR, "Linear", 8, None), IN_32_BITS]),
    "BERT": (tiny.bert, of_tokens, [(fused.LINEAR, "Linear", 14, None), IN_32_BITS]),
    "T5, gated silu": (
        lambda: t5("silu", 0.0),
        of_both,
        [
            (fused.LINEAR, "Linear", 36, None),
            ("RMSNorm", "T5LayerNorm", 12, None),
            ("gated MLP", "T5DenseGatedActDense", 4, None),
            NO_INTERFACE,
        ],
    ),
    "T5, gated gelu": (
        lambda: t5("gelu", 0.0),
        of_both,
        [
            (fused.LINEAR, "Linear", 36, None),
            ("RMSNorm", "T5LayerNorm", 12, None),
            ("gated MLP", "T5DenseGatedActDense", 4, "'act'"),
            NO_INTERFACE,
        ],
    ),
    "T5, with dropout": (
        lambda: t5("silu", 0.1),
        of_both,
        [
            (fused.LINEAR, "Linear", 36, None),
            ("RMSNorm", "T5LayerNorm", 12, None),
            ("gated MLP", "T5DenseGatedActDense", 4, "'dropout'"),
            NO_INTERFACE,
        ],
    ),
    "UNet": (unet, of_image, [(fused.LINEAR, "Linear", 50, None)]),
    "DiT": (dit, of_image, [(fused.LINEAR, "Linear", 20, None)]),
}


def trained(name: str, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    model = lk.attach(MODELS[name][0]().train(), lk.LoraConfig(rank=2, dropout=dropout))
    return tiny.randomise_factors(model, size=0.1)


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    run(model).square().mean().backward()
    return {n: p.grad.clone() for n, p in factors(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_report_says_what_is_fused_and_why_the_rest_is_not(name):
    found = fused.report(trained(name, 0.0))
    expected = MODELS[name][2]
    assert sorted(row[:3] for row in found) == sorted(row[:3] for row in expected)
    for row in found:
        (why,) = [e[3] for e in expected if e[:2] == row[:2]]
        assert (row.why_not is None) == (why is None)
        assert why is None or why in row.why_not
        assert ("not fused" in str(row)) == (why is not None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_a_copy_in_which_nothing_is_fused(name, dropout):
    model, run = trained(name, dropout), MODELS[name][1]
    torch.manual_seed(5)
    expected = run(plain(model)).detach()
    torch.manual_seed(5)
    torch.testing.assert_close(run(model).detach(), expected, atol=1e-4, rtol=1e-4)
    assert_same_gradients(gradients(model, run), gradients(plain(model), run), tolerance=1e-3)
