"""A merged model's tensors as GGUF stores them: GGUF's names, row order and types.

    llama, mistral   q and k: the rows of each head in llama.cpp's order (`gguf_names.permute`), also for biases
    gpt2             Conv1D's weights [in, out] transposed to [out, in]
    gemma            1 added to the norms, which transformers stores minus 1
    types            f32 for vectors and position embeddings; otherwise the requested f32, f16, bf16 or q8_0, with f16
                     instead of q8_0 for matrices whose row length is not a multiple of its block of 32

Only blocks of rows are in memory, except for permuted or transposed tensors, which are loaded one at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoint.merge_plan import Entry
from ..checkpoint.write import merged_rows
from ..errors import LorakitError, listing
from ..formats.gguf_names import ARCHITECTURES, Architecture, heads, package, permute
from ..formats.gguf_types import BLOCK, F16, F32, Q8_0

# Buffers that some files contain but no model needs: causal masks, rotary frequencies.
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_LLAMA = (
    "attn_norm.weight",
    *(f"attn_{n}.weight" for n in ("q", "k", "v", "output")),
    "ffn_norm.weight",
    *(f"ffn_{n}.weight" for n in ("gate", "up", "down")),
)
# The tensors required in each layer; other biases are written if the base has them.
_LAYER = {
    "llama": _LLAMA,
    "gemma": _LLAMA,
    "qwen2": (*_LLAMA, *(f"attn_{n}.bias" for n in "qkv")),
    "qwen3": (*_LLAMA, "attn_q_norm.weight", "attn_k_norm.weight"),
    "gpt2": tuple(
        f"{n}.{end}"
        for n in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
        for end in ("weight", "bias")
    ),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the GGUF. `entry`: its source in the merge plan; `shape` and `kind`: as stored in the GGUF."""

    name: str
    entry: Entry
    shape: tuple[int, ...]
    kind: str
    heads: int | None = None  # number of heads whose rows are permuted
    transposed: bool = False
    offset: float = 0.0  # added to every element

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the merged values in float32 and GGUF order, as blocks of rows [n, -1]; a vector as columns [n, 1]."""
        rows = (block for _, block in merged_rows(self.entry))
        if self.heads is None and not self.transposed:
            for block in rows:
                yield (block.float() + self.offset).numpy()
            return
        tensor = torch.cat([block.float() for block in rows])
        yield (tensor.T.contiguous() if self.transposed else permute(tensor, self.heads or 1, self.entry.name)).numpy()


def gguf_tensors(entries: Iterable[Entry], config: Any, kind: str) -> list[GgufTensor]:
    """Return the GGUF's tensors, in layer order. `kind`: the type for matrices.

    Raises LorakitError for tensors without a GGUF name, and for missing ones.
    """
    architecture = ARCHITECTURES[config.model_type]
    gguf = package()
    arch_id = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(arch_id, config.num_hidden_layers)
    tensors: dict[str, GgufTensor] = {}
    unknown: list[Entry] = []
    for entry in entries:
        if _BUFFERS.search(entry.name):
            continue
        name = _name(known, entry.name)
        if name is None or name in tensors:
            unknown.append(entry)
        else:
            tensors[name] = _gguf_tensor(name, entry, architecture, config, kind)
    added = [entry.name for entry in unknown if entry.source is None]
    if added:
        raise LorakitError(
            f"the adapter adds weights that a GGUF of a {config.model_type} cannot hold: {listing(added, 3)}\n"
            "  llama.cpp does not run an added head, for example; lorakit merge writes a transformers folder with it"
        )
    if unknown:
        names = listing([entry.name for entry in unknown], 3)
        raise LorakitError(
            f"{len(unknown)} of the base's tensors have no place in a GGUF of a {config.model_type}: {names}\n"
            f"  check that the base is a plain {config.model_type} language model"
        )
    _check_complete(tensors, architecture, config)
    return sorted(tensors.values(), key=lambda t: _order(t.name))


def _name(known: Any, name: str) -> str | None:
    """Return the GGUF name of a tensor, or None. Some files omit the prefix model. or transformer."""
    stem, _, end = name.rpartition(".")
    gguf_stem = next(
        (f for prefix in ("", "model.", "transformer.") if (f := known.get_name(prefix + stem)) is not None), None
    )
    return f"{gguf_stem}.{end}" if gguf_stem is not None and end in ("weight", "bias") else None


def _gguf_tensor(name: str, entry: Entry, architecture: Architecture, config: Any, kind: str) -> GgufTensor:
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None),
    }
    transposed = architecture.transposed and name.endswith(_TRANSPOSED)
    count = heads(name, counts) if architecture.permuted and name.startswith("blk.") else None
    shape = entry.shape[::-1] if transposed else entry.shape
    offset = 1.0 if architecture.name == "gemma" and name.endswith("norm.weight") else 0.0
    return GgufTensor(name, entry, shape, kind_of(name, shape, kind), count, transposed, offset)


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the type a tensor is stored in, given the type requested for matrices."""
    if len(shape) < 2 or name == "position_embd.weight":
        return F32
    return F16 if kind == Q8_0 and shape[-1] % BLOCK else kind


def _check_complete(tensors: dict[str, GgufTensor], architecture: Architecture, config: Any) -> None:
    required = ["token_embd.weight", "output_norm.weight"]
    required += ["position_embd.weight", "output_norm.bias"] if architecture.name == "gpt2" else []
    required += [] if config.tie_word_embeddings else ["output.weight"]
    required += [f"blk.{n}.{end}" for n in range(config.num_hidden_layers) for end in _LAYER[architecture.name]]
    missing = [name for name in required if name not in tensors]
    if missing:
        raise LorakitError(
            f"the base lacks {len(missing)} tensors of a {config.model_type} with its config: {listing(missing, 3)}\n"
            "  check that its files are complete and that config.json belongs to them"
        )
    rows, width = tensors["token_embd.weight"].shape
    if (rows, width) != (config.vocab_size, config.hidden_size):
        raise LorakitError(
            f"the base's embedding is {[rows, width]}, but its config says {[config.vocab_size, config.hidden_size]}\n"
            "  check that config.json belongs to these weights"
        )


def _order(name: str) -> tuple[float, str]:
    """Return the sort key for llama.cpp's loading order: embeddings, layers by number, the rest."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer:
        return int(layer[1]), name
    return (-1 if name.startswith(("token_embd", "position_embd")) else math.inf), name
