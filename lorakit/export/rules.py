"""What receiving programs accept, as checks on an adapter. Each finding says what is wrong and how to fix it.

vLLM 0.32: one rank from a fixed list, at least as large as any module's; plain factors; known linears; no saved modules
except a score head. SGLang and llama.cpp's tools read one alpha and ignore rsLoRA and patterns. ComfyUI and A1111 read
kohya's format, diffusers its own; which of a file's keys these read is in `image_programs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..adapter.adapter import Adapter
from ..adapter.algebra.edit import as_lora
from ..adapter.fingerprint import ONLY_ON
from ..adapter.virtual_tokens import BODY
from ..config import EXPERTS
from ..errors import listing
from ..formats.peft_experts import misread
from .canonical import canonical, is_canonical

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_HEADS = ("score", "classifier")
VLLM_VOCABULARY = 258_048
MERGE = "merge it into the base: lorakit merge"
# Name endings of the linears in vLLM's language models, including the parts of packed ones.
VLLM_LINEARS = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "qkv_proj",
        "gate_up_proj",
        "out_proj",
        "fc1",
        "fc2",
        "c_attn",
        "c_proj",
        "c_fc",
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "W_pack",
        "wqkv",
        "wo",
        "w1",
        "w2",
        "w3",
        "lm_head",
        "embed_tokens",
        "score",
        "in_proj",
        "x_proj",
        "dt_proj",
        "gate",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "q_a_proj",
        "q_b_proj",
    }
)


@dataclass(frozen=True)
class Finding:
    """Something that the receiver does not accept.

    fix: returns an equivalent adapter without it; None if it cannot be fixed that way. way_out: what the user can do.
    into_base: the modules and saved weights concerned, which could be merged into the base instead.
    """

    what: str
    way_out: str
    fix: Callable[[Adapter], Adapter] | None = None
    into_base: tuple[str, ...] = ()


Rule = Callable[[Adapter], Iterator[Finding]]


_BY_NAME = {"tokens": "trained tokens of", EXPERTS: "factors of each expert for"}


def no_other_kinds(adapter: Adapter) -> Iterator[Finding]:
    """No LoHa, LoKr or dense updates; a VeRA becomes the LoRA that it is."""
    same = {m: u.variant for m, u in adapter.updates.items() if u.factors is None and u.as_lora() is not None}
    if same:
        yield Finding(
            f"{len(same)} modules are LoRAs in other tensors ({', '.join(sorted(set(same.values())))})",
            "write them as LoRA",
            as_lora,
        )
        return
    if BODY in adapter.updates:
        yield Finding(
            "it has virtual tokens, which stand in front of each row and change no weight",
            "use it with lorakit, or where PEFT loads it; adapter.prune(['base_model']) is the LoRA beside them",
        )
    others = {
        m: u.variant
        for m, u in adapter.updates.items()
        if u.factors is None and u.variant not in _BY_NAME and m != BODY
    }
    if others:
        yield Finding(
            f"{len(others)} modules have updates of other kinds ({', '.join(sorted(set(others.values())))})",
            "lorakit resize approximates them by low-rank factors",
            into_base=tuple(others),
        )
    for kind, what in _BY_NAME.items():
        own = tuple(m for m, u in adapter.updates.items() if u.variant == kind)
        if own:
            yield Finding(f"{what} {listing(own, 2)}", MERGE, into_base=own)


def low_rank_only(adapter: Adapter) -> Iterator[Finding]:
    """No LoHa, LoKr or dense updates, and no DoRA."""
    yield from no_other_kinds(adapter)
    dora = [m for m, u in adapter.updates.items() if u.variant == "dora"]
    if dora:
        yield Finding(f"{len(dora)} modules are DoRA ({listing(dora, 2)})", MERGE, into_base=tuple(dora))


def no_loftq(adapter: Adapter) -> Iterator[Finding]:
    """For programs that cannot load a base as bitsandbytes or a GPTQ checkpoint has it."""
    quantization = adapter.metadata.get(ONLY_ON)
    if quantization:
        yield Finding(
            f"it started from what quantization ({quantization}) lost of the base's weights (LoftQ), and is right on "
            "weights quantized in that way only",
            "merge it into the quantized base (lorakit merge QUANTIZED ADAPTER OUT), and use the merged model",
        )


def no_saved_weights(adapter: Adapter) -> Iterator[Finding]:
    if adapter.saved:
        yield Finding(
            f"{len(adapter.saved)} saved weights ({listing(list(adapter.saved), 2)})",
            MERGE,
            into_base=tuple(adapter.saved),
        )


def no_embeddings(adapter: Adapter) -> Iterator[Finding]:
    if adapter.embeddings:
        yield Finding(
            f"{len(adapter.embeddings)} textual-inversion embeddings ({listing(list(adapter.embeddings), 2)})",
            "give them to the program as separate files, if it reads those; lorakit convert --allow-loss leaves them "
            "out",
        )


def _plain(adapter: Adapter) -> bool:
    """Whether all of it is LoRA."""
    return all(u.variant == "lora" for u in adapter.updates.values())


def one_scale(adapter: Adapter) -> Iterator[Finding]:
    """The same rank and scale 1 in all modules."""
    if _plain(adapter) and not is_canonical(adapter):
        ranks = sorted({f.A.shape[0] for f in adapter.factors.values()})
        scales = sorted({round(f.scale, 6) for f in adapter.factors.values()})
        yield Finding(
            f"ranks {listing(list(map(str, ranks)), 4)} and scales {listing([f'{s:g}' for s in scales], 4)}",
            "fold the scales into B and zero-pad the ranks",
            canonical,
        )


def one_rank_and_scale(adapter: Adapter) -> Iterator[Finding]:
    """The same rank and alpha / rank in all modules, as a config states them once."""
    fs = list(adapter.factors.values())
    same = len({(f.A.shape[0], f.scale, f.rslora) for f in fs}) <= 1 and not any(f.rslora or f.parts for f in fs)
    if not same and _plain(adapter):
        yield from one_scale(adapter)


def peft_experts(adapter: Adapter) -> Iterator[Finding]:
    modules = misread(adapter)
    if modules:
        endings = sorted({m.rsplit(".", 1)[-1] for m in modules})
        yield Finding(
            f"PEFT takes {listing(endings)} of this model for experts and would drop {listing(modules, 3)}",
            f"{MERGE}, or train with --exclude {','.join(endings)}",
            into_base=tuple(modules),
        )


def vllm_rank(adapter: Adapter) -> Iterator[Finding]:
    rank = max((f.A.shape[0] for f in adapter.factors.values()), default=0)
    if rank > VLLM_RANKS[-1]:
        yield Finding(
            f"rank {rank} exceeds the server's largest, {VLLM_RANKS[-1]}", f"lorakit resize --rank {VLLM_RANKS[-1]}"
        )
    elif rank not in VLLM_RANKS and rank:
        supported = next(r for r in VLLM_RANKS if r >= rank)
        yield Finding(
            f"rank {rank} is not one of {', '.join(map(str, VLLM_RANKS))}, which the server can be started with",
            f"zero-pad to rank {supported}",
            lambda a: canonical(a, supported),
        )


def vllm_modules(adapter: Adapter) -> Iterator[Finding]:
    unknown = [m for m in adapter.factors if m.rsplit(".", 1)[-1] not in VLLM_LINEARS]
    if unknown:
        yield Finding(
            f"{len(unknown)} modules are not linears that vLLM adapts ({listing(unknown, 2)})",
            MERGE,
            into_base=tuple(unknown),
        )
    conv = [m for m, f in adapter.factors.items() if f.kind == "conv"]
    if conv:
        yield Finding(f"{len(conv)} modules are convolutions ({listing(conv, 2)})", MERGE, into_base=tuple(conv))
    for module, f in adapter.factors.items():
        size = f.B.shape[0] if module.endswith("lm_head") else f.A.shape[1] if f.kind == "embedding" else 0
        if size > VLLM_VOCABULARY:
            yield Finding(
                f"'{module}' has a vocabulary of {size:,}, over {VLLM_VOCABULARY:,}", MERGE, into_base=(module,)
            )


def vllm_saved(adapter: Adapter) -> Iterator[Finding]:
    modules = {name.rpartition(".")[0] for name in adapter.saved}
    if len(modules) > 1 or any(m.rsplit(".", 1)[-1] not in VLLM_HEADS for m in modules):
        yield Finding(
            f"saved weights ({listing(sorted(adapter.saved), 2)}); vLLM accepts one head, score or classifier",
            MERGE,
            into_base=tuple(adapter.saved),
        )


@dataclass(frozen=True)
class Receiver:
    """A program that loads adapters: the format it reads, its rules, and the option or function that loads them."""

    format: str
    rules: tuple[Rule, ...]
    about: str


_GGUF = (no_loftq, low_rank_only, no_saved_weights, no_embeddings)
RECEIVERS = {
    "vllm": Receiver(
        "peft",
        (low_rank_only, vllm_saved, vllm_modules, one_rank_and_scale, vllm_rank, no_embeddings),
        "vLLM's --lora-modules",
    ),
    "sglang": Receiver(
        "peft", (low_rank_only, no_saved_weights, one_rank_and_scale, no_embeddings), "SGLang's --lora-paths"
    ),
    "llama.cpp": Receiver("gguf", _GGUF, "llama.cpp's --lora"),
    "ollama": Receiver("gguf", _GGUF, "Ollama, with its Modelfile"),
    "comfyui": Receiver("kohya", (no_saved_weights,), "ComfyUI's models/loras"),
    "a1111": Receiver("kohya", (no_saved_weights,), "A1111's models/Lora"),
    "diffusers": Receiver("diffusers", (no_other_kinds, no_saved_weights), "diffusers' load_lora_weights"),
    "peft": Receiver("peft", (no_embeddings, peft_experts), "PEFT's from_pretrained"),
    "mlx": Receiver("mlx", (no_loftq, no_saved_weights, no_embeddings), "mlx-lm's --adapter-path"),
    "canonical": Receiver("peft", (low_rank_only, one_scale, no_embeddings), "any program that reads PEFT's folder"),
}


def findings(adapter: Adapter, receiver: str) -> list[Finding]:
    """Everything in `adapter` that `receiver` does not accept. KeyError for an unknown receiver."""
    return [finding for rule in RECEIVERS[receiver].rules for finding in rule(adapter)]
