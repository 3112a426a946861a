"""Read a written file with independent code: numpy and the format's specification, none of lorakit's readers.

    PEFT        ΔW = lora_alpha / r · B A, alpha and r from the first matching key of `alpha_pattern`, `rank_pattern`;
                / √r with use_rslora
    kohya       ΔW = alpha / r · up · down, and LyCORIS' kinds (r: inner dimension of their products; s = 1 for a LoKr
                of two full factors)
    diffusers   as PEFT, ranks and alphas from the header's `lora_adapter_metadata`
    ComfyUI     as kohya, with lora_A and lora_B for down and up behind dotted names
    MLX         ΔW = scale · (a b)ᵀ
    GGUF        ΔW = adapter.lora.alpha / r · b a, rows of llama's q and k reordered

Every tensor in the file must be accounted for: an unknown one is a ValueError. Names are the file's own; for GGUF, the
given modules' names are looked up, because its name map goes only from transformers' names to GGUF's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import arrays, header
from .effect import Content, Effect, hadamard, kronecker, low_rank

Arrays = dict[str, np.ndarray]


def read(path: Path, format: str, modules: Iterable[str] = (), base: Mapping[str, Any] | None = None) -> Content:
    """Read what a file does to a base. For GGUF, `modules`: the names to look up; `base`: the base's config.

    Raises ValueError, KeyError or the like if the file is malformed.
    """
    if format == "gguf":
        return gguf(path, modules, base or {})
    return {"peft": peft, "kohya": kohya, "comfyui": comfyui, "diffusers": diffusers, "mlx": mlx}[format](path)


def peft(folder: Path) -> Content:
    config = _json(folder / "adapter_config.json")
    prefix = "base_model.model."
    tensors = {key.removeprefix(prefix): t for key, t in arrays(folder / "adapter_model.safetensors").items()}
    effects = _experts(tensors, config)
    for name, A, B in [
        *_pairs(tensors, ".lora_A.weight", ".lora_B.weight"),
        *_pairs(tensors, ".lora_embedding_A", ".lora_embedding_B"),
    ]:
        m = _magnitude(name, tensors.pop(f"{name}.lora_magnitude_vector", None), config)
        effects[name] = _effect(B, A, _scale(name, A, config), m)
    for key in [key for key in tensors if key.endswith(".trainable_tokens_delta")]:
        module, rows = key.removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter"), tensors.pop(key)
        effects[module] = _token_rows(module, rows, config)
    if unpaired := [key for key in tensors if ".lora_" in key]:
        raise ValueError(f"'{unpaired[0]}' has no counterpart")
    return Content(effects, {key.replace(".base_layer.", "."): t for key, t in tensors.items()})


def _experts(tensors: Arrays, config: Mapping[str, Any]) -> dict[str, Effect]:
    """Take the factors of `target_parameters` out of the tensors: of each expert, ΔW below the one before."""
    effects: dict[str, Effect] = {}
    names = [n for n in config.get("target_parameters") or [] if not n.endswith(".weight")]
    holders = {key.split(".lora_")[0].split(".base_layer")[0] for key in tensors if ".lora_A" in key}
    for holder in holders:
        # Wrappers lie within each other in the order in which the experts register their parameters.
        own = [n.rpartition(".")[2] for n in names if f".{holder}.{n.rpartition('.')[2]}".endswith(f".{n}")]
        for inside, parameter in enumerate(sorted(own, key=lambda p: p != "down_proj")):
            front = holder + inside * ".base_layer"
            A, B = tensors.pop(f"{front}.lora_A.weight"), tensors.pop(f"{front}.lora_B.weight")
            module = f"{holder}.{parameter}"
            rank = int(_by_pattern(config.get("rank_pattern") or {}, module, config["r"]))
            effects[module] = Effect(partial(_of_experts, A, B, rank, _scale(module, A[:rank], config)))
    return effects


def _of_experts(A: np.ndarray, B: np.ndarray, rank: int, scale: float) -> np.ndarray:
    """Return each expert's ΔW below the one before. The rows of A are sorted by expert, the columns of B by rank."""
    experts = len(A) // rank
    return np.concatenate([low_rank(B[:, e::experts], A[e * rank : (e + 1) * rank], scale) for e in range(experts)])


def _token_rows(module: str, rows: np.ndarray, config: Mapping[str, Any]) -> Effect:
    """Rows that replace those of `trainable_token_indices`, in the order of the ids. ValueError if their number
    differs.
    """
    indices = config.get("trainable_token_indices") or config["token_indices"]
    if isinstance(indices, dict):
        indices = next(ids for ending, ids in indices.items() if f".{module}".endswith(f".{ending}"))
    if len(indices) != len(rows):
        raise ValueError(f"'{module}' has {len(rows)} rows for {len(indices)} tokens")
    order = np.argsort(indices)
    return Effect(lambda: rows[order].astype(np.float64))


def diffusers(path: Path) -> Content:
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    configs = json.loads(header(file).get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
    tensors = arrays(file)
    # for text encoders diffusers reads only these
    older = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    effects: dict[str, Effect] = {}
    for name, A, B in [*_pairs(tensors, ".lora_A.weight", ".lora_B.weight"), *_pairs(tensors, *older)]:
        component, _, module = name.partition(".")
        config = {
            key.removeprefix(f"{component}."): value
            for key, value in configs.items()
            if key.startswith(f"{component}.")
        }
        # transformers reads text encoders, and expects the full parameter name.
        key = f"{name}.lora_magnitude_vector" + (".weight" if component.startswith("text_encoder") else "")
        m = _magnitude(name, tensors.pop(key, None), config)
        effects[name] = _effect(B, A, _scale(module, A, {"r": A.shape[0], "lora_alpha": A.shape[0], **config}), m)
    return _nothing_left(tensors, Content(effects))


def mlx(folder: Path) -> Content:
    scale = float(_json(folder / "adapter_config.json")["lora_parameters"]["scale"])
    tensors = arrays(folder / "adapters.safetensors")
    effects = {
        name: _effect(b.T, a.T, scale, tensors.pop(f"{name}.m", None))
        for name, a, b in _pairs(tensors, ".lora_a", ".lora_b")
    }
    return _nothing_left(tensors, Content(effects))


def kohya(path: Path) -> Content:
    keys: dict[str, Arrays] = {}
    tokens: Arrays = {}
    for full, tensor in arrays(path).items():
        key, _, suffix = full.partition(".")
        if key == "bundle_emb":
            tokens[full] = tensor
        else:
            keys.setdefault(key, {})[suffix] = tensor
    return Content({key: _lycoris(key, parts) for key, parts in keys.items()}, tokens)


def comfyui(path: Path) -> Content:
    keys: dict[str, Arrays] = {}
    kohyas = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    for full, tensor in arrays(path).items():
        key = full.rsplit(".", 2 if full.endswith(".weight") else 1)[0]
        suffix = full.removeprefix(f"{key}.")
        keys.setdefault(key, {})[kohyas.get(suffix, suffix)] = tensor
    return Content({key: _lycoris(key, parts) for key, parts in keys.items()})


def _lycoris(key: str, parts: Arrays) -> Effect:
    """Read the update of one key; the suffixes of its tensors determine the kind."""
    alpha = parts.pop("alpha", None)

    def scale(rank: int) -> float:
        return 1.0 if alpha is None else float(alpha.reshape(())) / rank

    def pop_all(prefix: str) -> Arrays:
        """Remove the tensors with this prefix; hada_w1_a becomes "w1a"."""
        return {s.removeprefix(prefix).replace("_", ""): parts.pop(s) for s in list(parts) if s.startswith(prefix)}

    if "lora_down.weight" in parts:
        down, up, m = parts.pop("lora_down.weight"), parts.pop("lora_up.weight"), parts.pop("dora_scale", None)
        effect = _effect(up, down, scale(down.shape[0]), None if m is None else m.reshape(m.shape[0], -1))
    elif loha := pop_all("hada_"):
        effect = Effect(lambda: hadamard(loha, scale(loha["w1b"].shape[0])))
    elif lokr := pop_all("lokr_"):
        inner = lokr.get("w1b", lokr.get("w2b"))
        effect = Effect(lambda: kronecker(lokr, 1.0 if inner is None else scale(inner.shape[0])))
    else:  # a full-rank difference; norms use their own names
        diff, bias = (
            next((parts.pop(s) for s in names if s in parts), None)
            for names in (("diff", "w_norm"), ("diff_b", "b_norm"))
        )
        matrix = None if diff is None else diff.reshape(diff.shape[0], -1).astype(np.float64)
        effect = Effect(None if matrix is None else lambda: matrix, bias=bias)
    if parts:
        raise ValueError(
            f"'{key}.{next(iter(parts))}' does not belong to any kind of update with the other tensors of its key"
        )
    return effect


# Architectures whose q and k rows llama.cpp's converter reorders (convert_hf_to_gguf.py, LlamaModel and its
# subclasses): llama.cpp rotates adjacent rows of a head together, transformers rows of its two halves.
_REORDERED = ("llama", "granite")
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def gguf(path: Path, modules: Iterable[str], base: Mapping[str, Any]) -> Content:
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    architecture = reader.fields["general.architecture"].contents()
    arch_id = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    modules = list(modules)
    layers = 1 + max((int(n) for module in modules for n in re.findall(r"\.(\d+)\.", module)), default=0)
    known = get_tensor_name_map(arch_id, layers)
    ours = {f"{known.get_name(module)}.weight": module for module in modules}
    tensors: Arrays = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    effects: dict[str, Effect] = {}
    for name, stored, b in _pairs(tensors, ".lora_a", ".lora_b"):
        a = stored.T if name == "token_embd.weight" else stored  # an embedding's is [vocabulary, r]
        heads = _HEADS.get(name.split(".")[-2]) if architecture in _REORDERED else None
        if heads is not None:
            count = int(base.get(heads) or base["num_attention_heads"])
            # from the file's [head, pair, half] to transformers' [head, half, pair]
            b = b.reshape(count, b.shape[0] // count // 2, 2, b.shape[1]).transpose(0, 2, 1, 3).reshape(b.shape)
        effects[ours.get(name, name)] = _effect(b, a, alpha / a.shape[0] if alpha else 1.0)
    return _nothing_left(tensors, Content(effects))


def _magnitude(name: str, m: np.ndarray | None, config: Mapping[str, Any]) -> np.ndarray | None:
    """Return PEFT's magnitude, one per output: [out], for convolutions [1, out, 1...].

    Raises ValueError unless present exactly if use_dora is set.
    """
    if (m is not None) != bool(config.get("use_dora")):
        raise ValueError(
            f"'{name}' has {'a' if m is not None else 'no'} lora_magnitude_vector, but use_dora is "
            f"{config.get('use_dora')}"
        )
    return None if m is None else m.reshape(-1, 1)


def _scale(name: str, A: np.ndarray, config: Mapping[str, Any]) -> float:
    """Return PEFT's scale: alpha / r, or alpha / √r with rsLoRA. Raises ValueError if A's rank is not the config's."""
    rank, alpha = (
        _by_pattern(config.get(f"{of}_pattern") or {}, name, config[default])
        for of, default in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if A.shape[0] != rank:
        raise ValueError(f"'{name}' has rank {A.shape[0]}, but its config says {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(pattern: Mapping[str, Any], name: str, default: float) -> float:
    """Apply PEFT's rule: the first key, in file order, that matches the full name or its end."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _effect(B: np.ndarray, A: np.ndarray, scale: float, magnitude: np.ndarray | None = None) -> Effect:
    return Effect(lambda: low_rank(B, A, scale), magnitude)


def _pairs(tensors: Arrays, down: str, up: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Remove all keys that end in `down` from `tensors`: (module, A, B) of each. Raises KeyError if B is missing."""
    names = [key.removesuffix(down) for key in tensors if key.endswith(down)]
    return [(name, tensors.pop(name + down), tensors.pop(name + up)) for name in names]


def _nothing_left(tensors: Arrays, content: Content) -> Content:
    if tensors:
        raise ValueError(f"'{next(iter(tensors))}' does not belong to any update")
    return content


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf8"))
