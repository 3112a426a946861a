"""kohya's file, which A1111 and ComfyUI read too: one flat `.safetensors`, `<prefix>_<module, dots to
underscores>.<suffix>`.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight      [r, in]
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight        [out, r]
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha                 a number

`names.py` maps keys to modules, `lycoris.py` suffixes to updates, and `kohya_parts.py` splits the fused weights of SD3
and Flux into diffusers' modules (qkv in three, linear1 into q, k, v and mlp; they share the down, rank and alpha stay)
and fuses them again. Both namings of a UNet are read; the one that kohya uses for the model is written.
Textual-inversion embeddings are bundled (`bundled.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import factors_of
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError, did_you_mean, listing
from ..io.json_object import parse_json
from . import bundled, lycoris, names
from .format import Format, ReadOptions, WriteOptions
from .kohya_metadata import metadata, stated_model, write_hashed
from .kohya_parts import fuse, part_sizes, split, swap_halves
from .native import as_read, contradicting
from .peft_config import checked
from .pipeline_names import in_pipeline
from .scale import clean, with_alpha_as_rank
from .spellings import is_spelling
from .telling import disagreement, misspelt, size_of, tell
from .unheld import beside_updates

OTHER = "other"  # a model that lorakit is told not to know


def fits(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is in kohya's format."""
    keys = list(keys)
    flat = [key for key in keys if key.startswith((*names.PREFIXES, bundled.PREFIX)) and "." in key]
    return bool(flat) and not any(is_spelling(key) for key in keys if not key.startswith(names.PREFIXES))


def read(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], model: str | None = None) -> Adapter:
    """Read a kohya file's tensors and header. AdapterError naming the file, and the key where one is at fault.

    Which model it is for is told from its keys, where several fit from its widths, then from its metadata, unless
    `model` says it; it is in `Adapter.metadata["model"]`, and the header in `["header"]`. The modules of a model that
    lorakit does not know keep the file's names.
    """
    keys, embeddings = _sort(tensors, path)
    if model is None:
        model = _model(keys, header, path) if keys else stated_model(header)
    model = None if model == OTHER else model
    known = names.modules_of(model) if model is not None else {}
    updates: dict[str, Update] = {}
    came_from: dict[str, str] = {}
    for key, parts in keys.items():
        modules = known.get(key, (key,))
        try:
            if model is not None and key not in known:
                raise AdapterError(f"key '{key}' is no module of {model}{did_you_mean(key, known)}")
            found = [lycoris.own_update(key, parts)] if model is None else _split(key, parts, modules, model)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        for module, update in zip(modules, found):
            if update is None:
                continue
            if module in updates:
                raise AdapterError(f"{path}: keys '{came_from[module]}' and '{key}' are both an update of '{module}'")
            updates[module], came_from[module] = update, key
    ours = parse_json(header["lorakit"], f"{path} (its header)") if "lorakit" in header else {}
    facts = ours | ({"model": model} if model is not None else {})
    facts = {k: v for k, v in facts.items() if k != "spelling"} | _spelling(keys, model)
    facts |= {"header": {k: v for k, v in header.items() if k != "lorakit"}}
    try:
        config = checked(path, lambda: _config(updates))
        return Adapter(config, updates, metadata=facts, embeddings=embeddings).check()
    except AdapterError as error:
        raise error if str(error).startswith(str(path)) else AdapterError(f"{path}: {error}") from error


def _spelling(keys: Mapping[str, Mapping[str, Tensor]], model: str | None) -> dict[str, Any]:
    """How to write the file back as it was read: the denoiser's prefix and naming, and whether it has alphas."""
    denoiser = [key for key in keys if key.startswith(names.TRANSFORMER)]
    prefix = next((p for p in names.TRANSFORMER if denoiser and all(key.startswith(p) for key in denoiser)), None)
    known = names.modules_of(model) if model is not None else {}
    modules = {key: known[key] for key in denoiser if key in known}
    original = any(
        len(parts) > 1 or not key.endswith("_" + parts[0].partition(".")[2].replace(".", "_"))
        for key, parts in modules.items()
    )
    low_rank = [parts for parts in keys.values() if "lora_up.weight" in parts]
    return {
        "spelling": {
            "prefix": prefix,
            "original": original,
            "alpha": any("alpha" in parts for parts in low_rank),
            "alphas": any("alpha" in parts for parts in keys.values()),
        }
    }


def losses(adapter: Adapter) -> list[str]:
    """What a kohya file cannot hold of this adapter, one line each."""
    adapter = in_pipeline(adapter)
    beside = beside_updates(replace(adapter, embeddings={})) + bundled.unbundled(adapter.embeddings)
    if _own_names(adapter):
        return unholdable(adapter) + beside
    model = written_for(adapter)
    if model is None and (adapter.updates or not adapter.embeddings):
        return [_no_model(adapter), *beside]
    if model is None:
        return beside
    found, nowhere = grouped(adapter, names.places(model))
    lines = [f"kohya has no name for {len(nowhere)} modules of {model}: {listing(nowhere)}"] if nowhere else []
    lines += unholdable(adapter)
    lines += [
        f"'{place.key}': kohya has one update for {listing(place.modules)}, and the adapter's updates of them are no "
        "one update"
        for place, updates in found.items()
        if fused(place, updates, model) is None
    ]
    return lines + beside


def unholdable(adapter: Adapter) -> list[str]:
    """Kinds of module that no file in LyCORIS' suffixes holds an update of."""
    lines = []
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
    return lines


def write(
    adapter: Adapter, path: Path, *, bake_alpha: bool | None = None, spelling: Mapping[str, Any] | None = None
) -> Path:
    """Write a kohya file and return its path. AdapterError, and nothing written, if it cannot hold all of the adapter.

    bake_alpha: multiply the scales into the ups and leave alpha out, which means alpha = r. By default that is done
    where the alphas of a component's modules differ: diffusers 0.42 gives those to the wrong modules. If such modules
    have one rank, alpha is that rank, for programs that take a missing alpha for 1.
    """
    adapter = in_pipeline(adapter.check())
    lost = losses(adapter)
    if lost:
        raise AdapterError(f"{path}: kohya's format cannot hold all of this adapter\n  " + "\n  ".join(lost))
    model = None if _own_names(adapter) else written_for(adapter)
    tensors: dict[str, Tensor] = {}
    written: dict[str, tuple[Update, Tensor | None]] = {}
    found = list(_written(adapter, model, spelling or {}))
    mixed = _mixed({key: update for key, update, _ in found}) if bake_alpha is None else {}
    for key, update, shape in found:
        if spelling is None:
            ranks_differ = mixed.get(_prefix(key))
            if ranks_differ is not None:
                update = update.with_weight(update.weight_alone.map_factors(with_alpha_as_rank))
            parts = lycoris.tensors_of(key, update, shape, bake_alpha or ranks_differ or False)
        else:
            parts, plain = as_read(key, update, shape, spelling)
            parts = {name: t for name, t in parts.items() if not (plain and name == f"{key}.alpha")}
        tensors |= parts
        written[key] = update, parts.get(f"{key}.alpha")
    tensors |= bundled.bundled(adapter.embeddings)
    write_hashed(path, tensors, metadata(adapter, model, written, path.stem))
    return path


def _mixed(updates: Mapping[str, Update]) -> dict[str, bool]:
    """Of each prefix whose low-rank updates have several alphas: whether they have several ranks too."""
    pairs: dict[str, list[tuple[int, float]]] = {}
    for key, f in factors_of(updates).items():
        pairs.setdefault(_prefix(key), []).append((f.A.shape[0], f.scale * f.A.shape[0]))
    return {
        prefix: len({rank for rank, _ in found}) > 1
        for prefix, found in pairs.items()
        if len({clean(alpha) for _, alpha in found}) > 1
    }


def _prefix(key: str) -> str:
    return next((prefix for prefix in names.PREFIXES if key.startswith(prefix)), "")


def _written(
    adapter: Adapter, model: str | None, spelling: Mapping[str, Any]
) -> Iterator[tuple[str, Update, tuple[int, ...]]]:
    """(key, its update, the weight's shape)."""
    if model is None:
        for key, update in adapter.updates.items():
            yield key, update, update.weight_shape() if update.changes_weight else ()
        return
    for place, found in grouped(adapter, names.places(model, spelling.get("prefix"), spelling.get("original")))[
        0
    ].items():
        whole = fused(place, found, model)
        assert whole is not None
        yield place.key, whole, names.shapes(model)[place.modules[0]]


def _sort(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({key: {suffix: tensor}}, token -> textual-inversion embedding). AdapterError for a key of another format."""
    keys: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        if full.startswith(bundled.PREFIX):
            embeddings[bundled.name_of(full)] = tensor
            continue
        key, _, suffix = full.partition(".")
        if not key.startswith(names.PREFIXES) or not suffix:
            raise AdapterError(
                f"{path}: key '{full}' is not one of a kohya file\n"
                f"  expected {', '.join(names.PREFIXES)} and a module's name, then a suffix"
            )
        keys.setdefault(key, {})[suffix] = tensor
    if not keys and not embeddings:
        raise AdapterError(f"{path} holds no update of any module")
    return keys, embeddings


def _model(keys: Mapping[str, Mapping[str, Tensor]], header: Mapping[str, str], path: Path) -> str | None:
    """Which model it is; None for one that lorakit does not know. AdapterError where most keys are a known model's, and
    for names of one model in the widths of none.
    """
    told = tell({key: size_of(parts) for key, parts in keys.items()}, stated_model(header))
    if told.contradiction:
        raise AdapterError(contradicting(path, told))
    if told.model is not None:
        return told.model
    key, left = told.unknown[0], len(told.unknown)
    near = misspelt(key, told.nearest)
    if 2 * left > len(keys) and near is None:
        return None
    suffix = next(iter(keys[key]))
    hint = f"; did you mean '{near}'?" if near else did_you_mean(key, names.modules_of(told.nearest))
    raise AdapterError(
        f"{path}: key '{key}.{suffix}' is no module of {told.nearest}, which fits best{hint}\n"
        f"  {left} of {len(keys)} modules are not known; to keep the file's own names: --model-type other "
        "(model_type='other')"
    )


def _split(key: str, parts: Mapping[str, Tensor], modules: tuple[str, ...], model: str) -> list[Update | None]:
    """A key's update as one of each of its modules (or none), the halves of its rows in diffusers' order."""
    shapes = names.shapes(model)
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


def written_for(adapter: Adapter) -> str | None:
    """The model it is written for: the one that it says, or that its base's class is of, if that has all of its
    modules; else the one that its names and widths fit.
    """
    said = adapter.metadata.get("model") or names.model_of_class(names.architecture_of(adapter))
    if said in names.KNOWN and all(module in names.shapes(said) for module in adapter.updates):
        return said
    sizes = {m: u.sizes for m, u in adapter.updates.items()}
    candidates = names.candidates(adapter.updates) if adapter.updates else []
    agreeing = [model for model in candidates if not disagreement(model, sizes)]
    return names.likeliest(agreeing or candidates, sizes)


def _no_model(adapter: Adapter) -> str:
    if not adapter.updates:
        return "kohya's files hold updates of a diffusion model's modules, and the adapter has none"
    best = min(names.KNOWN, key=lambda model: sum(m not in names.shapes(model) for m in adapter.updates))
    module = next(m for m in adapter.updates if m not in names.shapes(best))
    return (
        f"'{module}' is no module of {best}, which fits best{did_you_mean(module, names.shapes(best))}: kohya has no "
        "name for it"
    )


def _own_names(adapter: Adapter) -> bool:
    """Whether its modules have the names of a kohya file, of a model that lorakit does not know."""
    return bool(adapter.updates) and all(module.startswith(names.PREFIXES) for module in adapter.updates)


def grouped(
    adapter: Adapter, places: Mapping[str, names.KohyaKey]
) -> tuple[dict[names.KohyaKey, dict[str, Update]], list[str]]:
    """(the updates by the place that they are written in, the modules that have none)."""
    found: dict[names.KohyaKey, dict[str, Update]] = {}
    for module, update in adapter.updates.items():
        if module in places:
            found.setdefault(places[module], {})[module] = update
    return found, [module for module in adapter.updates if module not in places]


def fused(place: names.KohyaKey, found: Mapping[str, Update], model: str) -> Update | None:
    """The one update of a key, the halves of its rows in the ldm order; None if there is no such update."""
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


class Kohya(Format):
    """kohya's file, behind the interface of all formats."""

    name = "kohya"
    tells_model = True

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        return fits(keys)

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(*self.tensors_in(path), options.model_type)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path, bake_alpha=False if options.keep_alpha else None, spelling=options.spelling)

    def holds(self, spelling: Mapping[str, Any]) -> bool:
        return "prefix" in spelling


FORMAT = Kohya()
