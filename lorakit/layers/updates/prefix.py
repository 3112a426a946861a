"""Prefix tuning on a live model (Li & Liang 2021): trained keys and values in front of each layer's own.

    K' = [P_k; K]   V' = [P_v; V]        P_k, P_v: [heads, n, size] for each layer

They are put into the key-value cache before the first token, as PEFT does, so a model needs one, in training too. The
keys are those that attention multiplies with queries, after any rotation by position. Without an encoder they start as
those of tokens (`virtual.start`), computed by the model, so that it starts as with these tokens in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...config import LoraConfig
from ...errors import StateError, TargetError
from ...ops.autocast import is_casting
from ..bases import base_of
from ..virtual.body import CACHES, BodyLayer, Call, is_decoder, names_of
from ..virtual.start import base_alone, start_ids
from ..virtual.tokens import VirtualUpdate


class PrefixTokens(VirtualUpdate):
    kind = "prefix"
    in_front = False

    @classmethod
    def check_body(cls, layer: BodyLayer) -> None:
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        name, fix = type(layer).__name__.removeprefix("Lora"), "  use variant='prompt' or 'lora'"
        if not (is_decoder(layer.config) and set(CACHES) & {*names_of(type(layer).lora_probed)}):
            raise TargetError(
                f"{name} has no key-value cache, which a prefix is put into: it is no decoder of transformers\n{fix}"
            )
        layers = DynamicCache(config=layer.config).layers
        alike = all(type(each) in (DynamicLayer, DynamicSlidingWindowLayer) for each in layers)
        others = ("num_kv_shared_layers", "global_head_dim", "per_layer_config", "kv_lora_rank", "v_head_dim")
        given = layer.config.to_dict()
        own = next((each for each in others if given.get(each)), None)
        if not layers or not alike or own is not None:
            why = f" ({own})" if own is not None else ""
            raise TargetError(
                f"the layers of {name} do not all keep keys and values of one size{why}, which prefix tuning needs\n"
                f"{fix}"
            )

    @classmethod
    def sizes(cls, layer: BodyLayer) -> tuple[int, int, int, int]:
        config = layer.config
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        return kept * size, layers * 2 * kept * size, layers, kept

    @classmethod
    def start(cls, layer: BodyLayer, config: LoraConfig, options: Mapping[str, Any]) -> Tensor:
        n, (_, width, layers, _) = config.virtual_tokens, cls.sizes(layer)
        ids = start_ids(layer, config)
        if options["device"].type == "meta":
            return torch.empty(n, width, **options)
        if ids is None:
            return torch.randn(n, width, **options)
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()  # not by the config, whose sliding windows would drop the first tokens
        name = next(name for name in CACHES if name in names_of(type(layer).lora_probed))
        given = {"input_ids": ids[None].to(options["device"]), "use_cache": True, name: cache}
        with base_alone(layer):
            layer(**given)
        kept: list[Any] = cache.layers[:layers]
        states = [t for each in kept for t in (each.keys, each.values)]  # each [1, heads, n, size]
        flat = [t[0].transpose(0, 1).flatten(1).to(**options) for t in states]  # from each layer's device
        return torch.cat(flat, 1)  # [n, width]

    def put_in(self, layer: BodyLayer, call: Call) -> bool:
        checkpointed = layer.training and torch.is_grad_enabled()
        if checkpointed and any(getattr(module, "gradient_checkpointing", False) for module in layer.modules()):
            raise StateError(
                "gradient checkpointing with prefix tuning: transformers drops the key-value cache there, and the "
                "prefix with it\n  train without gradient checkpointing, or use prompt tuning"
            )
        if call.cache is None:
            from transformers.cache_utils import DynamicCache

            assert call.cache_name is not None
            call.inputs[call.cache_name] = DynamicCache(config=layer.config)
        _, _, layers, heads = self.sizes(layer)
        embedding = layer.lora_embedding()
        states = self.virtual()
        dtype = base_of(embedding).dtype(embedding)
        if is_casting(states):
            dtype = torch.get_autocast_dtype(states.device.type)
        states = (
            states.to(dtype).view(self.rank, layers * 2, heads, -1).permute(1, 2, 0, 3)
        )  # [layers·2, heads, n, size]
        states = states[:, None].expand(-1, call.rows, -1, -1, -1)
        for index, device in enumerate(_devices(layer, layers, states.device)):
            call.cache.update(states[2 * index].to(device), states[2 * index + 1].to(device), index)
        return True

    def taken_out(self, output: Any, call: Call) -> Any:
        """Return the output without the cache that the caller has not asked for."""
        if call.uses_cache:
            return output
        return type(output)(**{name: value for name, value in output.items() if name not in CACHES})


def _devices(body: nn.Module, layers: int, default: torch.device) -> list[torch.device]:
    """Return where each layer of the body computes: a model may be spread over devices."""
    blocks = next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    return [default] * layers if blocks is None else [_device(block, default) for block in blocks]


def _device(block: nn.Module, default: torch.device) -> torch.device:
    hooks = (module.__dict__.get("_hf_hook") for module in block.modules())  # accelerate's, which move weights too
    device = next((own for hook in hooks if (own := getattr(hook, "execution_device", None)) is not None), None)
    if device is not None:
        return torch.device(device)
    weight = next(block.parameters(), None)
    return default if weight is None else weight.device


Live = PrefixTokens
