"""Modules and models that bitsandbytes has quantized, and what their weights are by the equations of its papers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_lm
import torch
from torch import Tensor, nn

# Dettmers et al. 2023, appendix E, in single precision as the library has them.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def library():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lorakit[quant]'")


def linear4(weight: Tensor, bias: Tensor | None = None, kind: str = "nf4", double: bool = False) -> nn.Module:
    """A `Linear4bit` of this weight [out, in]."""
    module = library().nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias is not None, weight.dtype, compress_statistics=double, quant_type=kind
    )
    return _filled(module, weight, bias)


def linear8(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A `Linear8bitLt` of this weight [out, in]."""
    module = library().nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias is not None, has_fp16_weights=False)
    return _filled(module, weight, bias)


def _filled(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        module.weight.data = weight.clone()
        if bias is not None:
            module.bias.data = bias.clone()
    module.requires_grad_(False)
    return module.to("cpu").eval()  # `to` quantizes


def nf4_by_hand(weight: Tensor) -> Tensor:
    """The nearest NF4 value times its block's absmax, in float64."""
    blocks = weight.double().flatten().view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4, dtype=torch.float64)
    nearest = (blocks / absmax).unsqueeze(-1).sub(codes).abs().argmin(-1)
    return (codes[nearest] * absmax).view(weight.shape)


def int8_by_hand(weight: Tensor) -> Tensor:
    """Rounded to 127 steps of each row's absmax, in single precision as the library does it (ties), and in float64 from
    there; it takes the weight in half precision.
    """
    half = weight.half().float()
    absmax = half.abs().amax(1, keepdim=True)
    return (half * (127 / absmax)).round().double() * absmax.double() / 127


def llama(dtype: torch.dtype = torch.float32, vocabulary: int = tiny.VOCAB, positions: int = 32) -> nn.Module:
    """Like `tiny.llama`, of sizes that are whole blocks of 64: with other rows the library's kernel for CPUs with
    AVX512 takes absmax from the wrong block.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> nn.Module:
    """Like `tiny.gpt2`, of whole blocks too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tiny.VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def t5(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A seq2seq model of whole blocks, whose `wo` transformers does not quantize."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).to(dtype).eval()


def in_4_bits(folder: Path, double: bool = False, kind: str = "nf4", **options) -> nn.Module:
    """A model folder's model, its linears but the output layer quantized while loading."""
    library()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).eval()


def save(folder: Path) -> tuple[Path, Path]:
    """A language model of bytes with its tokenizer, like `tiny_lm`'s: its folder, and that of the same in 4 bits."""
    dense, packed = folder / "dense", folder / "packed"
    llama(vocabulary=258, positions=tiny_lm.POSITIONS).save_pretrained(dense)
    in_4_bits(dense, bnb_4bit_compute_dtype=torch.float32).save_pretrained(packed)
    for each in (dense, packed):
        tiny_lm.tokenizer().save_pretrained(each)
    return dense, packed


def unpacked(folder: Path, model: nn.Module) -> nn.Module:
    """The same model in float32 with the dequantized weights in place of the packed ones. `folder`: it, unquantized."""
    from transformers import AutoModelForCausalLM

    from lorakit.layers.bases import base_of
    from lorakit.layers.bases import quantized as quantized_modules

    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, module in quantized_modules(model).items():
        dense.get_submodule(name).weight.data = base_of(module).dense(module).float()
    return dense


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the squared logits of `tiny.example`, by parameter."""
    model.zero_grad()
    model(**tiny.example(model)).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
