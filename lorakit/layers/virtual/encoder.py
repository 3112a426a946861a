"""The networks that compute virtual tokens in training, with PEFT's layers and names.

    prefix, mlp      E → Linear → tanh → Linear                       (Li & Liang 2021, section 4.3)
    p_tuning, mlp    E → Linear → relu → Linear → relu → Linear
    p_tuning, lstm   E → bidirectional LSTM → Linear → relu → Linear  (Liu et al. 2021, section 2.2)

E: [n, dim] is trained too. All n tokens are computed at once: forward() -> [n, width].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config.virtual_tokens import VirtualKind
from ...errors import AdapterError


class Encoder(nn.Module):
    network: ClassVar[str] = "mlp"

    def __init__(self, n: int, dim: int, options: Mapping[str, Any]):
        super().__init__()
        self.embedding = nn.Embedding(n, dim, **options)

    def forward(self) -> Tensor:
        raise NotImplementedError


class PrefixMlp(Encoder):
    def __init__(self, n: int, dim: int, width: int, hidden: int, options: Mapping[str, Any]):
        super().__init__(n, dim, options)
        self.transform = nn.Sequential(
            nn.Linear(dim, hidden, **options), nn.Tanh(), nn.Linear(hidden, width, **options)
        )

    def forward(self) -> Tensor:
        tokens: Tensor = self.transform(self.embedding.weight)
        return tokens


class PromptMlp(Encoder):
    def __init__(self, n: int, dim: int, hidden: int, options: Mapping[str, Any]):
        super().__init__(n, dim, options)
        self.mlp_head = nn.Sequential(
            nn.Linear(dim, hidden, **options),
            nn.ReLU(),
            nn.Linear(hidden, hidden, **options),
            nn.ReLU(),
            nn.Linear(hidden, dim, **options),
        )

    def forward(self) -> Tensor:
        tokens: Tensor = self.mlp_head(self.embedding.weight)
        return tokens


class PromptLstm(Encoder):
    network = "lstm"

    def __init__(self, n: int, dim: int, hidden: int, layers: int, dropout: float, options: Mapping[str, Any]):
        super().__init__(n, dim, options)
        # torch warns of a dropout without a second layer to be between
        between = dropout if layers > 1 else 0.0
        self.lstm_head = nn.LSTM(dim, hidden, layers, dropout=between, bidirectional=True, batch_first=True, **options)
        self.mlp_head = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden, **options), nn.ReLU(), nn.Linear(2 * hidden, dim, **options)
        )

    def forward(self) -> Tensor:
        states, _ = self.lstm_head(self.embedding.weight[None])  # [1, n, 2 hidden]
        tokens: Tensor = self.mlp_head(states)[0]
        return tokens


def new_encoder(
    kind: VirtualKind,
    network: str,
    n: int,
    dim: int,
    width: int,
    hidden: int,
    layers: int,
    dropout: float,
    options: Mapping[str, Any],
) -> Encoder:
    """Build a network with random weights. `network`: "mlp" or "lstm"; `options`: dtype and device."""
    if kind == "prefix":
        return PrefixMlp(n, dim, width, hidden, options)
    if network == "lstm":
        return PromptLstm(n, dim, hidden, layers, dropout, options)
    return PromptMlp(n, dim, hidden, options)


def encoder_from(
    kind: VirtualKind, tensors: Mapping[str, Tensor], dropout: float, options: Mapping[str, Any]
) -> Encoder:
    """Build the network that has these weights, whose sizes they show. Raises AdapterError if they make none."""
    target, options = torch.device(options["device"]), {**options, "device": torch.device("cpu")}
    # Loading must not change what is drawn next, so the start, which is overwritten, is made on the CPU.
    with torch.random.fork_rng(devices=[]):
        try:
            n, dim = tensors["embedding.weight"].shape
            first = "transform.0.weight" if kind == "prefix" else "mlp_head.0.weight"
            if "lstm_head.weight_ih_l0" in tensors:
                layers = sum(name.startswith("lstm_head.weight_ih_l") and "reverse" not in name for name in tensors)
                hidden = tensors["lstm_head.weight_ih_l0"].shape[0] // 4
                encoder: Encoder = PromptLstm(n, dim, hidden, layers, dropout, options)
            else:
                last = "transform.2.weight" if kind == "prefix" else "mlp_head.4.weight"
                encoder = new_encoder(
                    kind, "mlp", n, dim, tensors[last].shape[0], tensors[first].shape[0], 0, 0.0, options
                )
            if target.type != "meta":  # `lorakit plan` has shapes alone
                encoder.load_state_dict(dict(tensors))
        except (KeyError, ValueError, RuntimeError) as error:
            raise AdapterError(
                f"the encoder of the virtual tokens has other tensors than {kind}'s: {error}\n"
                "  remove its file and its name in lorakit.json to go on with the virtual tokens alone"
            ) from None
    return encoder.to(target)
