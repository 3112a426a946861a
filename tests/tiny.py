"""Tiny models of the kinds that adapters meet, each built from a seed, with a fixed input and its output (`logits`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.layers.saved import SavedParameters
from lorakit.layers.updates.update import LiveUpdate

VOCAB = 48


def llama(tied: bool = False, dtype: torch.dtype = torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def t5(vocab_size: int = VOCAB):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lin1(torch.relu(self.lin0(x)))))


def mlp(dtype: torch.dtype = torch.float32) -> Mlp:
    torch.manual_seed(0)
    return Mlp().to(dtype).eval()


class Cnn(nn.Module):
    """A convolution of each dimension, with what a convolution can have: stride, padding and its modes, dilation,
    groups.
    """

    def __init__(self, groups: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=dilation)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding="valid", dilation=(dilation, 1), groups=groups)
        self.conv2_circular = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
        self.conv3 = nn.Conv3d(4, 6, (1, 1, 3), padding=(0, 0, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 4, 4, 6, 6]"""
        pooled = self.conv3(x).mean((2, 3, 4)) + self.conv2(x[:, :, 0]).mean((2, 3)) + self.conv1(x.flatten(2)).mean(2)
        return self.head(torch.tanh(pooled + self.conv2_circular(x[:, :, 1]).square().mean((2, 3))))


def cnn(groups: int = 1, dilation: int = 2) -> Cnn:
    torch.manual_seed(0)
    return Cnn(groups, dilation).eval()


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8, padding_idx=3)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.emb(ids)))


def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder().eval()


def example(model: nn.Module) -> dict:
    """The input that `logits` gives the model."""
    made = torch.Generator().manual_seed(7)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind == "Mlp":
        return {"x": torch.randn(5, 3, 10, generator=made).to(next(model.parameters()).dtype)}
    if kind == "Cnn":
        return {"x": torch.randn(2, 4, 4, 6, 6, generator=made)}
    if kind == "Embedder":
        return {"ids": torch.randint(0, 20, (2, 7), generator=made)}
    ids = torch.randint(3, VOCAB, (2, 9), generator=made)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if kind == "t5" else {"input_ids": ids}


def logits(model: nn.Module) -> Tensor:
    """The model's output on its example, without gradients, in the mode it is in."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = example(base)
    with torch.no_grad():
        out = model(**inputs) if hasattr(base, "config") else model(*inputs.values())
    return getattr(out, "logits", out)


def randomise_factors(model: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    """Random numbers for every factor, and a change of every weight that an adapter holds whole. Stands in for
    training.
    """
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LiveUpdate):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=made) * size)
            if isinstance(module, SavedParameters):
                for name in module.adapters():
                    for parameter in module.get(name).values():
                        parameter.add_(torch.randn(parameter.shape, generator=made) * size)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's parameters and buffers, to be compared with `same_bits`."""
    plain: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in f".{name}":
            continue
        # A tensor class (torchao's quantized weights) by the tensors that it holds.
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        plain |= {f"{name}.{part}": getattr(tensor, part).detach().clone() for part in parts}
        plain |= {} if parts else {name: tensor.detach().clone()}
    return plain


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit (-0 and NaN too) and in the order of their keys."""
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype
        and torch.equal(*(each[n].contiguous().reshape(-1).view(torch.uint8) for each in (a, b)))
        for n in a
    )


def picture(model: nn.Module) -> dict:
    """Everything that attach may touch and detach has to give back."""
    return {
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: set(m.__dict__) for n, m in model.named_modules()},
        "identity": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "gradients": {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
        "training": {n: m.training for n, m in model.named_modules()},
        "keys": list(model.state_dict()),
    }
