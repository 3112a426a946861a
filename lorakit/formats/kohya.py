"""kohya's file, which A1111 and ComfyUI read too: one flat `.safetensors`, `<prefix>_<module, dots to
underscores>.<suffix>`.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight      [r, in]
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight        [out, r]
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha                 a number

`names.py` maps keys to modules, `lycoris.py` suffixes to updates, and `kohya_parts.py` splits the fused weights of SD3
and Flux into diffusers' modules (qkv in three, linear1 into q, k, v and mlp; they share the down, rank and alpha stay)
and fuses them again. Both namings of a UNet are read; the one that kohya uses for the model is written. Bundled
textual-inversion embeddings (`bundle_emb.<token>.string_to_param.*`) are read, but not written: only A1111 looks for
them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import factors_of
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError, did_you_mean, listing
from ..io.json_object import parse_json
from . import lycoris, names
from .kohya_metadata import metadata, stated_model, write_hashed
from .kohya_parts import fuse, part_sizes, split, swap_halves
from .peft_config import checked

_EMBEDDING = "bundle_emb."


def fits(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is in kohya's format."""
    return any(key.startswith(names.PREFIXES) and "." in key for key in keys)


def read(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """The adapter of a kohya file's tensors and header. AdapterError naming the file and the key at fault.

    The model is found from the keys; if several fit, from the widths, then from the metadata. It is in
    `Adapter.metadata["model"]`, the header in `["header"]`.
    """
    keys, embeddings = _sort(tensors, path)
    model = _model(keys, header, path)
    known, shapes = names.modules_of(model), names.shapes(model)
    updates: dict[str, Update] = {}
    came_from: dict[str, str] = {}
    for key, parts in keys.items():
        modules = known[key]
        try:
            found = _split(key, parts, modules, model, shapes)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        for module, update in zip(modules, found):
            if update is None:
                continue
            if module in updates:
                raise AdapterError(f"{path}: keys '{came_from[module]}' and '{key}' are both an update of '{module}'")
            updates[module], came_from[module] = update, key
    ours = parse_json(header["lorakit"], f"{path} (its header)") if "lorakit" in header else {}
    facts = ours | {"model": model, "header": {k: v for k, v in header.items() if k != "lorakit"}}
    try:
        config = checked(path, lambda: _config(updates))
        return Adapter(config, updates, metadata=facts, embeddings=embeddings).check()
    except AdapterError as error:
        raise error if str(error).startswith(str(path)) else AdapterError(f"{path}: {error}") from error


def losses(adapter: Adapter) -> list[str]:
    """What a kohya file cannot hold of this adapter, one line each."""
    model = _written_for(adapter)
    if model is None:
        return [_no_model(adapter), *_beside(adapter)]
    places, grouped = names.places(model), _grouped(adapter, model)
    nowhere = [module for module in adapter.updates if module not in places]
    lines = [f"kohya has no name for {len(nowhere)} modules of {model}: {listing(nowhere)}"] if nowhere else []
    for module, f in adapter.factors.items():
        if f.kind == "embedding" or f.transposed or f.groups > 1:
            what = (
                "a transposed weight"
                if f.transposed
                else "an embedding"
                if f.kind == "embedding"
                else "a grouped convolution"
            )
            lines.append(f"'{module}': kohya's files hold no update of {what}")
    lines += [
        f"'{place.key}': kohya has one update for {listing(place.modules)}, and the adapter's updates of them cannot "
        "be fused"
        for place, found in grouped.items()
        if _fused(place, found, model) is None
    ]
    return lines + _beside(adapter)


def write(adapter: Adapter, path: Path, *, bake_alpha: bool = False) -> Path:
    """Write a kohya file and return its path. AdapterError, and nothing written, if it cannot hold all of the adapter.

    bake_alpha: multiply the scales into the ups, rounded to their dtype, and leave alpha out, which means alpha = r:
    for programs that mix up alphas which differ by module, as diffusers 0.42 does.
    """
    adapter.check()
    lost = losses(adapter)
    if lost:
        raise AdapterError(f"{path}: kohya's format cannot hold all of this adapter\n  " + "\n  ".join(lost))
    model = _written_for(adapter)
    assert model is not None
    tensors: dict[str, Tensor] = {}
    written: dict[str, tuple[Update, Tensor | None]] = {}
    for place, found in _grouped(adapter, model).items():
        update = _fused(place, found, model)
        assert update is not None
        parts = lycoris.tensors_of(place.key, update, names.shapes(model)[place.modules[0]], bake_alpha)
        tensors |= parts
        written[place.key] = update, parts.get(f"{place.key}.alpha")
    write_hashed(path, tensors, metadata(adapter, model, written, path.stem))
    return path


def _sort(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({key: {suffix: tensor}}, token -> textual-inversion embedding). AdapterError for a key of another format."""
    keys: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        if full.startswith(_EMBEDDING):
            token, _, part = full.removeprefix(_EMBEDDING).partition(".")
            embeddings[token if part.startswith(("string_to_param", "emb_params")) else f"{token}.{part}"] = tensor
            continue
        key, _, suffix = full.partition(".")
        if not key.startswith(names.PREFIXES) or not suffix:
            raise AdapterError(
                f"{path}: key '{full}' is not one of a kohya file\n"
                f"  expected {', '.join(names.PREFIXES)} and a module's name, then a suffix"
            )
        keys.setdefault(key, {})[suffix] = tensor
    if not keys:
        raise AdapterError(f"{path} holds no update of any module")
    return keys, embeddings


def _model(keys: Mapping[str, Mapping[str, Tensor]], header: Mapping[str, str], path: Path) -> str:
    unknown = {model: [key for key in keys if key not in names.modules_of(model)] for model in names.MODELS}
    models = [model for model in names.MODELS if not unknown[model]]
    if not models:
        nearest = min(names.MODELS, key=lambda model: len(unknown[model]))
        key, left = unknown[nearest][0], len(unknown[nearest])
        suffix = next(iter(keys[key]))
        raise AdapterError(
            f"{path}: key '{key}.{suffix}' is no module of {nearest}, which fits "
            f"best{did_you_mean(key, names.modules_of(nearest))}\n"
            f"  {left} of {len(keys)} modules are not known; lorakit knows the modules of {', '.join(names.MODELS)}"
        )
    if len(models) == 1:
        return models[0]
    sizes = {}
    for key, parts in keys.items():
        down, up = (
            parts.get("lora_down.weight", parts.get("hada_w1_b")),
            parts.get("lora_up.weight", parts.get("hada_w1_a")),
        )
        modules = names.modules_of(models[0])[key]
        if down is not None and up is not None and down.dim() > 1 and up.dim() > 1 and len(modules) == 1:
            sizes[modules[0]] = (up.shape[0], down.shape[1])
    model = names.likeliest(models, sizes, stated_model(header))
    assert model is not None
    return model


def _split(
    key: str, parts: Mapping[str, Tensor], modules: tuple[str, ...], model: str, shapes: Mapping[str, tuple[int, ...]]
) -> list[Update | None]:
    """A key's update as an update (or None) for each of its modules, with its rows in diffusers' order."""
    stored = [shapes[module][0] for module in modules]
    if len(modules) == 1:
        update = lycoris.update(key, parts, shapes[modules[0]])
        update.check(key)
        return [swap_halves(update, f"key '{key}'") if _swapped(model, key, modules[0], update) else update]
    update = lycoris.update(key, parts, (sum(stored), *shapes[modules[0]][1:]))
    update.check(key)
    return split(update, part_sizes(update.sizes[0], stored, f"key '{key}'"), f"key '{key}'")


def _config(updates: Mapping[str, Update]) -> LoraConfig:
    """A config with the most common rank and alpha, and patterns for the other modules."""
    low_rank = factors_of(updates)
    ranks, alphas = {m: f.rank for m, f in low_rank.items()}, {m: f.alpha for m, f in low_rank.items()}
    targets = sorted({module.rpartition(".")[2] for module in updates})
    if not low_rank:
        return LoraConfig(targets=targets or "all-linear")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        rank=int(rank),
        alpha=alpha,
        targets=targets,
        rank_pattern={f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(m)}": a for m, a in alphas.items() if a != alpha},
    )


def _written_for(adapter: Adapter) -> str | None:
    """The model to write for: the one in the adapter's metadata if it has all modules, else the one that fits their
    names and widths; None if none does.
    """
    said = adapter.metadata.get("model")
    if said in names.MODELS and all(module in names.shapes(said) for module in adapter.updates):
        return said
    return names.model_of(adapter.updates, {m: u.sizes for m, u in adapter.updates.items()})


def _no_model(adapter: Adapter) -> str:
    if not adapter.updates:
        return "kohya's files hold updates of a diffusion model's modules, and the adapter has none"
    best = min(names.MODELS, key=lambda model: sum(m not in names.shapes(model) for m in adapter.updates))
    module = next(m for m in adapter.updates if m not in names.shapes(best))
    return (
        f"'{module}' is no module of {best}, which fits best{did_you_mean(module, names.shapes(best))}: kohya has no "
        "name for it"
    )


def _beside(adapter: Adapter) -> list[str]:
    lines = []
    if adapter.saved:
        lines.append(f"{len(adapter.saved)} saved weights: {listing(adapter.saved)}")
    if adapter.embeddings:
        lines.append(f"{len(adapter.embeddings)} textual-inversion embeddings: {listing(adapter.embeddings)}")
    return lines


def _grouped(adapter: Adapter, model: str) -> dict[names.KohyaKey, dict[str, Update]]:
    """The updates, grouped by the key that they are written under."""
    grouped: dict[names.KohyaKey, dict[str, Update]] = {}
    places = names.places(model)
    for module, update in adapter.updates.items():
        if module in places:
            grouped.setdefault(places[module], {})[module] = update
    return grouped


def _fused(place: names.KohyaKey, found: Mapping[str, Update], model: str) -> Update | None:
    """The update of a key, with its rows in the ldm order; None if its modules' updates cannot be fused."""
    if len(place.modules) > 1:
        return fuse(found, place.modules, [names.shapes(model)[m][0] for m in place.modules])
    module, update = next(iter(found.items()))
    return swap_halves(update, f"'{module}'") if _swapped(model, place.key, module, update) else update


def _swapped(model: str, key: str, module: str, update: Update) -> bool:
    """Whether the key has the halves of the module's rows swapped. The width of a bias's weight is looked up in the
    model's list.
    """
    out, width = update.sizes
    if not update.changes_weight:
        width = names.shapes(model)[module][1] if names.shapes(model)[module][0] == out else 0
    return names.swaps_halves(model, key, module, (out, width))
