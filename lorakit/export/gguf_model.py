"""The tensors of a merged model as a GGUF model holds them: under its names, in its order of rows, in its types.

    llama, mistral   q and k: the rows of each head in llama.cpp's order (`gguf_names.permute`), biases too
    gpt2             Conv1D's weights [in, out] turned to [out, in]
    gemma            1 added to the norms, which transformers stores less 1
    f32 for vectors and position embeddings; else the type that is asked for: f32, f16, bf16 or q8_0, and f16 instead of q8_0 for
    matrices whose rows are no multiple of its blocks of 32

Blocks of rows are in memory, not tensors, but for those that are permuted or turned: these one at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoint.plan import Entry
from ..checkpoint.tensors import merged_rows
from ..errors import LorakitError, listing
from ..formats.gguf_names import ARCHITECTURES, Architecture, heads, package, permute
from ..formats.gguf_types import BLOCK, F16, F32, Q8_0

# Buffers that some files hold and no model needs: causal masks, rotary frequencies.
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_LLAMA = ("attn_norm.weight", *(f"attn_{n}.weight" for n in ("q", "k", "v", "output")), "ffn_norm.weight",
          *(f"ffn_{n}.weight" for n in ("gate", "up", "down")))  # fmt: skip
# What each layer must have; biases beyond these are written where the base has them.
_LAYER = {
    "llama": _LLAMA,
    "gemma": _LLAMA,
    "qwen2": (*_LLAMA, *(f"attn_{n}.bias" for n in "qkv")),
    "qwen3": (*_LLAMA, "attn_q_norm.weight", "attn_k_norm.weight"),
    "gpt2": tuple(f"{n}.{end}" for n in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down") for end in ("weight", "bias")),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """One tensor of the GGUF: `entry` of the merge, and how it lies there."""

    name: str
    entry: Entry
    shape: tuple[int, ...]
    kind: str
    heads: int | None = None  # whose rows are permuted
    turned: bool = False
    plus: float = 0.0

    def blocks(self) -> Iterator[np.ndarray]:
        """Its merged numbers in float32, in the GGUF's order, as blocks of rows [n, -1]; a vector's as columns [n, 1]."""
        rows = (block for _, block in merged_rows(self.entry))
        if self.heads is None and not self.turned:
            for block in rows:
                yield (block.float() + self.plus).numpy()
            return
        whole = torch.cat([block.float() for block in rows])
        yield (whole.T.contiguous() if self.turned else permute(whole, self.heads or 1, self.entry.name)).numpy()


def place(entries: Iterable[Entry], config: Any, kind: str) -> list[Placed]:
    """The GGUF's tensors, in the order of its layers. LorakitError for what has no place there, and for what it lacks."""
    architecture = ARCHITECTURES[config.model_type]
    gguf = package()
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    made: dict[str, Placed] = {}
    strange: list[Entry] = []
    for entry in entries:
        if _BUFFERS.search(entry.name):
            continue
        name = _name(known, entry.name)
        if name is None or name in made:
            strange.append(entry)
        else:
            made[name] = _placed(name, entry, architecture, config, kind)
    added = [entry.name for entry in strange if entry.source is None]
    if added:
        raise LorakitError(
            f"the adapter saved weights whole that the base lacks, and that have no place in a GGUF of a {config.model_type}: {listing(added, 3)}\n"
            "  a head of its own, say, which llama.cpp does not run; lorakit merge writes a transformers folder with it"
        )
    if strange:
        names = listing([entry.name for entry in strange], 3)
        raise LorakitError(
            f"{len(strange)} of the base's tensors have no place in a GGUF of a {config.model_type}: {names}\n  is it a language model of that kind?"
        )
    _check_whole(made, architecture, config)
    return sorted(made.values(), key=lambda p: _order(p.name))


def _name(known: Any, name: str) -> str | None:
    """GGUF's name of a tensor; some files leave the model's own part of the names out."""
    stem, _, end = name.rpartition(".")
    found = next((f for front in ("", "model.", "transformer.") if (f := known.get_name(front + stem)) is not None), None)
    return f"{found}.{end}" if found is not None and end in ("weight", "bias") else None


def _placed(name: str, entry: Entry, architecture: Architecture, config: Any, kind: str) -> Placed:
    own = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": getattr(config, "num_key_value_heads", None)}
    turned = architecture.transposed and name.endswith(_TURNED)
    count = heads(name, own) if architecture.permuted and name.startswith("blk.") else None
    shape = entry.shape[::-1] if turned else entry.shape
    plus = 1.0 if architecture.name == "gemma" and name.endswith("norm.weight") else 0.0
    return Placed(name, entry, shape, kind_of(name, shape, kind), count, turned, plus)


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) < 2 or name == "position_embd.weight":
        return F32
    return F16 if kind == Q8_0 and shape[-1] % BLOCK else kind


def _check_whole(made: dict[str, Placed], architecture: Architecture, config: Any) -> None:
    wanted = ["token_embd.weight", "output_norm.weight"]
    wanted += ["position_embd.weight", "output_norm.bias"] if architecture.name == "gpt2" else []
    wanted += [] if config.tie_word_embeddings else ["output.weight"]
    wanted += [f"blk.{n}.{end}" for n in range(config.num_hidden_layers) for end in _LAYER[architecture.name]]
    lacking = [name for name in wanted if name not in made]
    if lacking:
        raise LorakitError(f"the base lacks {len(lacking)} tensors that a {config.model_type} of its config has: {listing(lacking, 3)}")
    rows, width = made["token_embd.weight"].shape
    if (rows, width) != (config.vocab_size, config.hidden_size):
        raise LorakitError(f"the base's embedding is {[rows, width]}, its config says {[config.vocab_size, config.hidden_size]}")


def _order(name: str) -> tuple[int, str]:
    """Embeddings, the layers in order, the rest: as llama.cpp's loader walks them."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer:
        return int(layer[1]), name
    return (-1 if name.startswith(("token_embd", "position_embd")) else math.inf), name  # type: ignore[return-value]
