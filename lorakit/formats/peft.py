"""PEFT's folder: `adapter_config.json`, `adapter_model.safetensors` (or `.bin`), and ours beside them: `lorakit.json`.

    base_model.model.<module>.lora_A.weight, .lora_B.weight            linear [r, in], [out, r]; conv [r, in, *k], [out,
                                                                       r/g, 1...]
    base_model.model.<module>.lora_embedding_A, _B                     [r, vocab], [dim, r]
    base_model.model.<module>.lora_magnitude_vector                    DoRA's: [out]; conv [1, out, 1...]
    base_model.model.<module>.base_layer.bias, <other>.bias            trained biases
    base_model.model.<module>.<parameter>                              modules_to_save

Packed projections and shared grouped convolutions are written as plain factors of a larger rank (exactly: alpha grows
with it), and read back in their compact shapes. PEFT 0.2's MergedLinear (`enable_lora`: A [n·r, in], B [out of the n
parts, r, 1], as in loralib) is read as a packed projection. Kinds of adapter with keys of their
own ((IA)³, LoHa, LoKr, VeRA) are a file each: see `peft_kind`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.biased import Biased
from ..adapter.dora import Dora
from ..adapter.fingerprint import ONLY_ON
from ..adapter.lora import Factors, Kind
from ..adapter.update import Update
from ..config import EXPERTS, LoraConfig
from ..errors import AdapterError, listing
from ..io.atomic import write_text
from ..io.json_object import read_json
from ..io.tensors import write_tensors
from ..ops.packed import compact_packed, group_blocks
from . import (
    peft_adalora,
    peft_attention,
    peft_bottleneck,
    peft_ia3,
    peft_ln_tuning,
    peft_loha,
    peft_lokr,
    peft_parameters,
    peft_prompts,
    peft_tokens,
    peft_vera,
)
from .format import Format, ReadOptions, WriteOptions
from .inside import OURS, not_adapter
from .mlx import is_mlx_config
from .peft_config import TASK, changed_base, checked, dumps, from_peft, loftq_base, own_task, to_peft
from .peft_enable_lora import enabled_parts, merged_linear
from .peft_experts import misread, note
from .peft_files import read_ours
from .peft_keys import CONFIG, PREFIX, sort
from .peft_kind import PeftKind
from .peft_plain import growth, plain_pair
from .peft_shards import PICKLE, WEIGHTS, read_weights
from .scale import config_of
from .spellings import is_spelling
from .unheld import embeddings, other_kinds, part_dora

KINDS: tuple[PeftKind, ...] = (
    peft_bottleneck.KIND,
    peft_ia3.KIND,
    peft_loha.KIND,
    peft_lokr.KIND,
    peft_vera.KIND,
    *peft_prompts.KINDS,
)


def is_peft(path: Path) -> bool:
    """Whether a folder, or the folder of a file, is PEFT's. (`adapter_config.json` is MLX's name too.)"""
    folder = _folder(path)
    if not (folder / CONFIG).exists() or not (path.is_dir() or path.name in (CONFIG, WEIGHTS, PICKLE)):
        return False
    try:
        return not is_mlx_config(read_json(folder / CONFIG))
    except AdapterError:
        return True  # reading it says what is wrong


def start_of(path: Path) -> str | None:
    """The initialization of PEFT's folder if it changed the base's weights ("pissa", "olora"...), else None."""
    return changed_base(read_json(_folder(path) / CONFIG))


def read(path: Path, started: bool = False) -> Adapter:
    """Read PEFT's folder. AdapterError naming the file and key at fault.

    started: accept an adapter that was initialized from the base's weights, whose factors are no update of that base.
    """
    return peft_prompts.joined(_read(path, started), _folder(path), _read)


def _read(path: Path, started: bool = False) -> Adapter:
    folder = _folder(path)
    where = folder / CONFIG
    if not where.exists():
        raise AdapterError(f"{folder} is no PEFT adapter: {CONFIG} is missing")
    values = peft_ln_tuning.as_lora(peft_tokens.as_lora(read_json(where)))
    peft_type = str(values.get("peft_type"))
    kind = next((kind for kind in KINDS if kind.peft_type == peft_type), None)
    adalora = peft_type == peft_adalora.KIND
    fields = peft_adalora.as_lora(values) if adalora else values
    config, transposed = kind.config(values, where) if kind is not None else from_peft(fields, where, started)
    enabled = enabled_parts(values, where)
    tensors, header, weights = read_weights(folder)
    config, tensors = peft_ln_tuning.with_norms(config, tensors, PREFIX), peft_ln_tuning.renamed(tensors)
    ours = read_ours(folder, header, weights)
    if (quantization := loftq_base(values)) is not None:
        ours.setdefault(ONLY_ON, quantization)
    task = ours.pop(TASK, None)
    config = checked(
        folder / OURS, lambda: config.replace(packed=ours.pop("packed", None) or {}, task=config.task or task)
    )
    if kind is not None:
        plain = {key.removeprefix(kind.prefix): tensor for key, tensor in tensors.items()}
        updates, saved = kind.updates(values, plain, config, weights, ours)
        return Adapter(config, updates, saved, ours).check()
    if adalora:
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        low_rank, rest = peft_adalora.taken_apart(values, plain, weights)
        _, saved = sort(rest, weights, False)
        known = {
            name: getattr(config, name) for name in ("base", "revision", "task", "save_modules", "bias", "dropout")
        }
        return Adapter(config_of(low_rank, **known), low_rank, saved, ours).check()
    packed = {module: tuple(parts) for module, parts in config.packed.items()}
    tokens = peft_tokens.take(tensors, values, PREFIX, weights)
    config = peft_tokens.resolved(config, tokens)
    experts = peft_parameters.take(tensors, values, config, ours, PREFIX, weights)
    config = peft_parameters.resolved(config, experts, ours)
    halves, saved = sort(tensors, weights, bool(values.get("use_dora")), bool(values.get("lora_bias")))
    halves = peft_attention.renamed(halves, weights)
    if enabled is not None:
        factors = {
            module: merged_linear(module, pair, config, enabled, weights) for module, (_, pair) in halves.items()
        }
        endings = {module.rsplit(".", 1)[-1] for module in factors}
        return Adapter(
            config.replace(packed={ending: list(enabled) for ending in endings}), factors, saved, ours
        ).check()
    given = {
        module: _factors(
            module,
            kind,
            pair,
            config,
            transposed,
            packed.get(module),
            weights,
            peft_attention.attention_of(module, halves),
        )
        for module, (kind, pair) in halves.items()
    }
    factors = peft_attention.as_applied(given, values)
    low: dict[str, Update] = {module: _update(module, halves[module][1], f, weights) for module, f in factors.items()}
    return Adapter(config, {**low, **experts, **tokens}, saved, ours).check()


def losses(adapter: Adapter) -> list[str]:
    """What PEFT's folder cannot hold of this adapter, one line each."""
    adapter, virtual = peft_prompts.parted(adapter)
    if virtual is not None:
        return losses(adapter) + losses(virtual)
    kind = _kind_of(adapter)
    if kind is not None:
        return embeddings(adapter) + kind.losses(adapter)
    unbiased, biases = _without_biases(adapter)
    low_rank = {m: unbiased.updates[m] for m in unbiased.factors}
    lost = _together(adapter) or other_kinds(peft_tokens.without(unbiased), "lora", "dora", EXPERTS)
    lost += embeddings(adapter)
    lost += peft_parameters.losses(adapter)
    lost += part_dora(low_rank, "PEFT") + peft_attention.losses(unbiased.updates) + peft_tokens.losses(adapter)
    by_input = [m for m, u in low_rank.items() if not u.outputs_independent]
    strange = [m for m in biases if unbiased.updates[m].variant != "lora" or unbiased.factors[m].kind == "embedding"]
    if strange:
        lost.append(f"the bias beside {listing(strange, 2)}: PEFT has lora_bias for plain LoRA of layers only")
    if by_input:
        lost.append(
            f"DoRA's magnitude of {listing(by_input, 2)}: PEFT has one number for each output, this one for each input"
        )
    return lost


def write(adapter: Adapter, path: Path) -> Path:
    """Write PEFT's folder and return it. AdapterError, and nothing written, if it cannot hold all of the adapter."""
    adapter.check()
    lost = losses(adapter)
    if lost:
        raise AdapterError(f"{path}: PEFT's format cannot hold all of this adapter\n  " + "\n  ".join(lost))
    adapter, virtual = peft_prompts.parted(adapter)
    if virtual is not None:
        write(virtual, path / peft_prompts.FOLDER)
    adapter, biases = _without_biases(adapter)
    kind = _kind_of(adapter)
    prefix = PREFIX if kind is None else kind.prefix
    tensors, ranks, alphas = _tensors_of(adapter) if kind is None else kind.tensors_of(adapter, prefix)
    for module, f in adapter.factors.items() if biases else ():  # all modules have one, or none has
        bias = biases.get(module)
        tensors[f"{PREFIX}{module}.lora_B.bias"] = torch.zeros(f.B.shape[0]) if bias is None else bias / f.scale
    for name, tensor in adapter.saved.items():
        module, _, last = name.rpartition(".")
        adapted_bias = last == "bias" and module in adapter.updates
        tensors[f"{prefix}{module}.base_layer.bias" if adapted_bias else prefix + name] = tensor
    tensors |= peft_tokens.tensors_of(adapter, PREFIX)
    experts = peft_parameters.experts_of(adapter)
    for parameter, own in experts.items():
        ranks[parameter] = own.rank
        alphas[parameter] = own.scale * (math.sqrt(own.rank) if adapter.config.rslora else own.rank)
    tensors |= peft_parameters.tensors_of(experts, PREFIX)
    transposed = any(f.transposed for f in adapter.factors.values())
    dora = any(u.variant == "dora" for u in adapter.updates.values())
    written = peft_attention.as_written(adapter.factors)  # of another rank, parts are no longer to be seen
    packed = {m: list(f.parts) for m, f in adapter.factors.items() if f.parts and f.A.shape == written[m].A.shape}
    ours = {**adapter.metadata, **({"packed": packed} if packed else {}), **peft_parameters.noted(adapter)}
    ours |= {} if kind is None else kind.ours(adapter)
    ours |= own_task(adapter.config)
    for file, held in ({} if kind is None else kind.beside(adapter)).items():
        write_tensors(path / file, held, {"format": "pt"})
    own_config = adapter.config.replace(save_modules=_save_modules(adapter))
    own_config = peft_attention.with_targets(own_config, adapter.factors, ranks)
    values = to_peft(own_config, ranks, alphas, transposed, dora, experts)
    values |= {"lora_bias": bool(biases)} | peft_attention.fields(adapter.factors)
    write_tensors(path / WEIGHTS, tensors, {"format": "pt", "lorakit": json.dumps(ours, sort_keys=True)})
    values = peft_tokens.to_peft(values, adapter) if kind is None else kind.fields(values, adapter)
    write_text(path / CONFIG, dumps(values))
    write_text(path / OURS, json.dumps(ours, indent=2, sort_keys=True) + "\n")
    return path


def _kind_of(adapter: Adapter) -> PeftKind | None:
    """Return the kind that all updates are of; None for LoRA, DoRA, trained tokens, and several kinds."""
    found = {u.variant for u in adapter.updates.values()}
    return next((kind for kind in KINDS if found == {kind.variant}), None)


def _together(adapter: Adapter) -> list[str]:
    """A line for updates beside those of a kind that PEFT writes alone."""
    kind = next((kind for kind in KINDS if any(u.variant == kind.variant for u in adapter.updates.values())), None)
    if kind is None:
        return []
    own = [m for m, u in adapter.updates.items() if u.variant == kind.variant]
    others = [m for m in adapter.updates if m not in own]
    if not others:
        return []
    fewer = own if len(own) < len(others) else others
    kinds = " and ".join(sorted({u.variant for u in adapter.updates.values()}))
    way = "" if any(adapter.updates[m].needs_base for m in others) else ": resize converts all to factors"
    fewer = own if len(own) < len(others) else others
    return [
        f"updates of another kind ({listing(fewer, 2)}): {kinds} together, and PEFT has {kind.peft_type} alone{way}"
    ]


def _without_biases(adapter: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
    """(the adapter without the changes of biases beside low-rank factors, these): PEFT's lora_bias."""
    biased = {m: u for m, u in adapter.updates.items() if isinstance(u, Biased) and u.inner.factors is not None}
    updates = {m: biased[m].inner if m in biased else u for m, u in adapter.updates.items()}
    return replace(adapter, updates=updates), {m: u.bias for m, u in biased.items()}


def _tensors_of(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """The tensors by PEFT's keys, and each module's rank and alpha in PEFT's terms."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    factors = peft_attention.as_written(adapter.factors)
    for module, f in factors.items():
        A, B, alpha = plain_pair(f)
        if f.rslora != adapter.config.rslora:  # PEFT's config has one rule for all modules
            alpha = f.scale * (math.sqrt(A.shape[0]) if adapter.config.rslora else A.shape[0])
        if peft_attention.attention_of(module, factors) is None:
            ranks[module], alphas[module] = A.shape[0], alpha
        key = PREFIX + peft_attention.key_of(module, factors)
        infix, suffix = ("lora_embedding_", "") if f.kind == "embedding" else ("lora_", ".weight")
        tensors[f"{key}.{infix}A{suffix}"], tensors[f"{key}.{infix}B{suffix}"] = A, B
        own = adapter.updates[module].tensors()
        if "magnitude" in own:
            shape = (1, -1, *[1] * (f.A.dim() - 2)) if f.kind == "conv" else (-1,)
            tensors[f"{key}.lora_magnitude_vector"] = own["magnitude"].reshape(shape)
    return tensors, ranks, alphas


def _save_modules(adapter: Adapter) -> list[str]:
    """The config's save_modules, and other modules with saved weights (the other end of a tied weight); no biases."""
    named = list(adapter.config.save_modules)
    for name in adapter.saved:
        module, _, last = name.rpartition(".")
        if last != "bias" and not any(f".{entry}." in f".{name}" for entry in named):
            named.append(module)
    return named


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _update(module: str, pair: dict[str, Tensor], factors: Factors, where: Path) -> Update:
    """Return the update that the factors are part of: a DoRA, with a bias, or they themselves."""
    update: Update = Dora(factors, _magnitude(module, pair, where)) if "magnitude" in pair else factors
    return Biased(update, pair["bias"].float() * factors.scale) if "bias" in pair else update


def _factors(
    module: str,
    kind: Kind,
    pair: dict[str, Tensor],
    config: LoraConfig,
    transposed: bool,
    parts: tuple[bool, ...] | None,
    where: Path,
    attention: str | None = None,
) -> Factors:
    """`attention`: the one that has this module as out_proj, whose rank and alpha PEFT takes."""
    A, B = pair["A"], pair["B"]
    rank, alpha = config.rank_of(attention or module), config.alpha_of(attention or module)
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != rank:
        raise AdapterError(
            f"{where}: '{module}' has A {list(A.shape)}; its config says rank {rank}, so [{rank}, ...] was expected"
        )
    if kind != "conv":
        if parts is not None:
            if compact_packed(B, parts) is None:
                raise AdapterError(
                    f"{where}: '{module}' is packed as {list(parts)} according to its metadata, but its B is not"
                )
            alpha /= growth(sum(parts), config.rslora)
        across = transposed and kind == "linear"
        return Factors(A, B, alpha, kind, config.rslora, across, parts=parts)
    groups = A.shape[0] // B.shape[1] if B.shape[1] and A.shape[0] % B.shape[1] == 0 else 1
    compact = group_blocks(A, B, groups) if groups > 1 and A.shape[1] % groups == 0 else None
    if compact is not None:
        A, alpha = compact[0], alpha / growth(groups, config.rslora)
    return Factors(A, B, alpha, "conv", config.rslora, groups=groups)


def _magnitude(module: str, pair: dict[str, Tensor], where: Path) -> Tensor:
    """DoRA's magnitude [out, 1] from PEFT's [out] or [1, out, 1...]. AdapterError for another shape."""
    magnitude = pair["magnitude"]
    out, conv = pair["B"].shape[0], pair["A"].dim() > 2
    if magnitude.numel() != out or list(magnitude.shape) != ([1, out, *[1] * (pair["A"].dim() - 2)] if conv else [out]):
        raise AdapterError(
            f"{where}: '{module}' has a lora_magnitude_vector {list(magnitude.shape)}, which does not fit its {out} "
            "outputs"
        )
    return magnitude.reshape(-1, 1)


class Peft(Format):
    """PEFT's folder, behind the interface of all formats."""

    name = "peft"
    is_folder = True
    files = (WEIGHTS, PICKLE)

    def owns(self, path: Path) -> bool:
        return is_peft(path)

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        if path.name in (WEIGHTS, PICKLE) and not any(map(is_spelling, keys)):
            raise AdapterError(not_adapter(keys, path))  # its config is missing
        return False

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(path)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path)

    def note(self, adapter: Adapter) -> str | None:
        notes = (
            note(misread(adapter), len(adapter.updates)),
            peft_attention.note(adapter.factors),
            peft_prompts.note(adapter),
        )
        return "\n".join(said for said in notes if said is not None) or None

    def stale(self, path: Path) -> list[str]:
        # A reader may prefer the first to the new weights; the others are parts of an adapter with virtual tokens.
        return [PICKLE, peft_prompts.ENCODER, peft_prompts.FOLDER]


FORMAT = Peft()
