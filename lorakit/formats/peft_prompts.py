"""PEFT's folders of virtual tokens: PREFIX_TUNING, PROMPT_TUNING and P_TUNING, read and written.

    prompt_embeddings                     prompt, P-tuning: [n, dim]; prefix: [n, layers · 2 · token_dim]
    base_model.<module>.<parameter>       modules_to_save (without the "model." that other kinds have)

PEFT keeps the result of an encoder alone, so training cannot go on from its files. lorakit writes the encoder beside
them (`ENCODER`, named in lorakit.json); PEFT does not look at it.

LoRA with virtual tokens is no adapter of PEFT's: the LoRA is its folder, and the virtual tokens are a folder in it
(`FOLDER`, named in lorakit.json), each of which PEFT loads by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.update import Update
from ..adapter.virtual_tokens import BODY, TITLES, VirtualTokens
from ..config import LoraConfig, VirtualTokenSettings
from ..config.virtual_tokens import VirtualKind
from ..errors import AdapterError, LorakitWarning, listing
from ..io.tensors import read_tensors
from .peft_config import checked
from .peft_kind import PeftKind, trained_biases

ENCODER, FOLDER = "prompt_encoder.safetensors", "virtual_tokens"
ENCODER_KEY, FOLDER_KEY = "prompt_encoder", "virtual_tokens"  # in lorakit.json
_PREFIX, _TOKENS = "base_model.", "prompt_embeddings"


class _Virtual(PeftKind):
    prefix = _PREFIX

    def __init__(self, peft_type: str, variant: VirtualKind):
        self.peft_type, self.variant, self.kind = peft_type, variant, variant

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        if values.get("num_transformer_submodules") not in (None, 1):
            raise AdapterError(
                f"{where}: num_transformer_submodules is {values['num_transformer_submodules']}: virtual tokens of an "
                "encoder-decoder, which lorakit does not have\n  use it with PEFT"
            )
        own: dict[str, Any] = {
            "variant": self.variant,
            "virtual_tokens": values.get("num_virtual_tokens"),
            "task": values.get("task_type"),
            "base": values.get("base_model_name_or_path"),
            "revision": values.get("revision"),
            "save_modules": list(dict.fromkeys(values.get("modules_to_save") or [])),
        }
        lstm = self.kind == "p_tuning" and values.get("encoder_reparameterization_type") == "LSTM"
        if lstm:
            own |= {"prompt_encoder": "lstm", "encoder_layers": values.get("encoder_num_layers", 2)}
            own |= {"encoder_dropout": values.get("encoder_dropout", 0.0)}
        elif self.kind == "prefix" and values.get("prefix_projection"):
            own["prompt_encoder"] = "mlp"
        if "prompt_encoder" in own or self.kind == "p_tuning":
            own["encoder_size"] = values.get("encoder_hidden_size")
        return checked(where, lambda: LoraConfig(**own)), False

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        saved = dict(tensors)
        embeddings = saved.pop(_TOKENS, None)
        shape = [] if embeddings is None else list(embeddings.shape)
        if embeddings is None or len(shape) != 2 or shape[0] != config.virtual_tokens:
            found = "is missing" if embeddings is None else f"is {shape}"
            raise AdapterError(
                f"{where}: '{_TOKENS}' {found}; expected [{config.virtual_tokens}, ...], as adapter_config.json has "
                f"num_virtual_tokens {config.virtual_tokens}"
            )
        strange = [key for key in saved if ".lora_" in key or key.startswith("prompt_encoder.")]
        if strange:
            raise AdapterError(f"{where}: key '{strange[0]}' does not belong: peft_type is '{self.peft_type}'")
        sizes: list[Any] = [values.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")]
        known = all(type(size) is int and size > 0 for size in sizes)
        layers, heads, dim = sizes if known else (0, 0, 0)
        if self.kind == "prefix" and (not known or shape[1] != 2 * layers * dim or dim % heads):
            raise AdapterError(
                f"{where}: '{_TOKENS}' is {shape}, and adapter_config.json says num_layers {sizes[0]}, "
                f"num_attention_heads {sizes[1]}, token_dim {sizes[2]}; expected a width of 2 · layers · token_dim"
            )
        encoder = _read_encoder(where.parent, ours)
        return {BODY: VirtualTokens(self.kind, embeddings, layers, heads, encoder)}, saved

    def losses(self, adapter: Adapter) -> list[str]:
        return trained_biases(adapter, TITLES[self.kind])

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        return {_TOKENS: _own(adapter).embeddings}, {}, {}

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        own, config = _own(adapter), adapter.config
        width = own.embeddings.shape[1]
        found = {
            name: values[name]
            for name in ("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "revision")
        } | {
            "num_attention_heads": own.heads or None,
            "num_layers": own.layers or None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": own.rank,
            "peft_type": self.peft_type,
            "task_type": config.task or "CAUSAL_LM",  # PEFT's class of model for it puts the tokens in front
            "token_dim": width // (2 * own.layers) if self.kind == "prefix" else width,
        }
        if self.kind == "prompt":
            return found | {"prompt_tuning_init": "RANDOM"}
        lstm = "lstm_head.weight_ih_l0" in own.encoder
        first = own.encoder.get("transform.0.weight", own.encoder.get("mlp_head.0.weight"))
        hidden = None if first is None else first.shape[0] // (2 if lstm else 1)
        found["encoder_hidden_size"] = hidden or config.encoder_size or found["token_dim"]
        if self.kind == "prefix":
            return found | {"prefix_projection": bool(own.encoder)}
        return found | {
            "encoder_reparameterization_type": "LSTM" if lstm or config.prompt_encoder == "lstm" else "MLP",
            "encoder_num_layers": config.encoder_layers,
            "encoder_dropout": config.encoder_dropout,
        }

    def ours(self, adapter: Adapter) -> dict[str, Any]:
        return {ENCODER_KEY: ENCODER} if _own(adapter).encoder else {}

    def beside(self, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
        encoder = _own(adapter).encoder
        return {ENCODER: dict(encoder)} if encoder else {}


KINDS = (_Virtual("PREFIX_TUNING", "prefix"), _Virtual("PROMPT_TUNING", "prompt"), _Virtual("P_TUNING", "p_tuning"))


def parted(adapter: Adapter) -> tuple[Adapter, Adapter | None]:
    """Return the adapter without virtual tokens, and these as an adapter of their own; None if it has nothing else, or
    none.
    """
    own = adapter.updates.get(BODY)
    if not isinstance(own, VirtualTokens) or len(adapter.updates) == 1:
        return adapter, None
    updates = {m: u for m, u in adapter.updates.items() if m != BODY}
    metadata = {**adapter.metadata, FOLDER_KEY: FOLDER}
    rest = replace(adapter, config=adapter.config.without_virtual_tokens(), updates=updates, metadata=metadata)
    return rest, Adapter(adapter.config.virtual_tokens_alone(own.kind), {BODY: own}, metadata=adapter.metadata)


def joined(adapter: Adapter, folder: Path, read: Callable[[Path], Adapter]) -> Adapter:
    """Return the adapter with the virtual tokens that its folder has beside it. AdapterError if they are missing."""
    if FOLDER_KEY not in adapter.metadata:
        return adapter
    metadata = {name: value for name, value in adapter.metadata.items() if name != FOLDER_KEY}
    if not (folder / FOLDER).is_dir():
        raise AdapterError(
            f"{folder}: its adapter was trained with virtual tokens, and the folder '{FOLDER}' with them is not there\n"
            "  put it beside adapter_config.json; the LoRA alone is another adapter"
        )
    beside = read(folder / FOLDER)
    own = beside.updates.get(BODY)
    if not isinstance(own, VirtualTokens) or len(beside.updates) > 1:
        raise AdapterError(f"{folder / FOLDER} holds no virtual tokens alone, but {listing(beside.updates, 2)}")
    settings = {
        name: getattr(beside.config, name)
        for name in VirtualTokenSettings.model_fields
        if name in beside.config.model_fields_set
    }
    config = adapter.config.replace(prompt=own.kind, **settings)
    return replace(adapter, config=config, updates={**adapter.updates, BODY: own}, metadata=metadata).check()


def note(adapter: Adapter) -> str | None:
    """Say that PEFT loads LoRA and virtual tokens one at a time; None if the adapter does not have both."""
    if parted(adapter)[1] is None:
        return None
    return (
        f"PEFT loads the LoRA alone, or the virtual tokens alone ({FOLDER}/); both on one model are for lorakit, whose "
        "files these are"
    )


def _own(adapter: Adapter) -> VirtualTokens:
    own = adapter.updates[BODY]
    assert isinstance(own, VirtualTokens)
    return own


def _read_encoder(folder: Path, ours: dict[str, Any]) -> dict[str, Tensor]:
    """Read the encoder that lorakit.json names. Without its file, training goes on with the vectors themselves."""
    name = ours.pop(ENCODER_KEY, None)
    if name is None:
        return {}
    if name != ENCODER or not (folder / ENCODER).is_file():
        warnings.warn(
            f"{folder}: {ENCODER}, which lorakit.json names, is not there: the virtual tokens work as they were "
            "trained, and further training is of the tokens themselves, without the encoder",
            LorakitWarning,
            stacklevel=2,
        )
        return {}
    return read_tensors(folder / ENCODER)[0]
