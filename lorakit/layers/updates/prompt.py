"""Prompt tuning on a live model (Lester et al. 2021): trained input embeddings in front of the tokens' own.

    x' = [P; E(tokens)]        P: [n, dim]

The outputs of the n positions are dropped. They start as the embeddings of tokens (`virtual.start`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config import LoraConfig
from ...config.virtual_tokens import VirtualKind
from ...errors import TargetError
from ..bases import base_of
from ..virtual.body import BodyLayer, Call, names_of
from ..virtual.start import base_alone, start_ids
from ..virtual.tokens import VirtualUpdate


class PromptTokens(VirtualUpdate):
    kind: ClassVar[VirtualKind] = "prompt"
    in_front = True

    @classmethod
    def check_body(cls, layer: BodyLayer) -> None:
        if "inputs_embeds" not in names_of(type(layer).lora_probed):
            raise TargetError(
                f"{type(layer).__name__.removeprefix('Lora')} takes no inputs_embeds, in front of which virtual tokens "
                "could stand\n  use variant='lora'"
            )

    @classmethod
    def sizes(cls, layer: BodyLayer) -> tuple[int, int, int, int]:
        _, dim = base_of(layer.lora_embedding()).shape(layer.lora_embedding())
        config = layer.config
        return dim, dim, getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)

    @classmethod
    def start(cls, layer: BodyLayer, config: LoraConfig, options: Mapping[str, Any]) -> Tensor:
        n, (_, dim, _, _) = config.virtual_tokens, cls.sizes(layer)
        ids = start_ids(layer, config)
        if options["device"].type == "meta":
            return torch.empty(n, dim, **options)
        if ids is None:
            return torch.randn(n, dim, **options)
        embedding = layer.lora_embedding()
        with base_alone(embedding):  # the module rather than rows of its weight, which some multiply (Gemma by √dim)
            own: Tensor = embedding(ids[None].to(options["device"]))[0]
        return own.to(**options, copy=True)  # [n, dim]

    def put_in(self, layer: BodyLayer, call: Call) -> bool:
        own = call.inputs.get("inputs_embeds")
        if own is None:
            own = layer.lora_embedding()(call.inputs["input_ids"])
        tokens = self.virtual().to(own.dtype).expand(call.rows, -1, -1)
        call.inputs |= {"input_ids": None, "inputs_embeds": torch.cat([tokens, own], 1)}  # [rows, n + q, dim]
        return False

    def taken_out(self, output: Any, call: Call) -> Any:
        """Drop the n positions. What a body pools by itself (BERT's pooler) has read the first of them, as in PEFT."""
        n, length = self.rank, self.rank + call.length

        def own(t: Tensor) -> Tensor:
            return t[:, n:] if t.dim() == 3 and t.shape[1] == length else t

        changed: dict[str, Any] = {"last_hidden_state": own(output.last_hidden_state)}
        if output.get("hidden_states") is not None:
            changed["hidden_states"] = tuple(own(t) for t in output.hidden_states)
        if output.get("attentions") is not None:
            changed["attentions"] = tuple(a if a is None else a[:, :, n:] for a in output.attentions)
        return type(output)(**{**output, **changed})


Live = PromptTokens
