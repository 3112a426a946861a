"""diffusers' `pytorch_lora_weights.safetensors`: read in all spellings (`spellings.py`), written so that diffusers 0.42
loads it exactly.

    <component>.<module>.lora_A.weight, .lora_B.weight     linear [r, in], [out, r]; conv [r, in, *k], [out, r, 1, 1]
    <component>.<module>.lora_magnitude_vector             DoRA: [out], conv [1, out, 1, 1]
    header "lora_adapter_metadata": JSON {"unet.r": 8, "unet.lora_alpha": 16, "unet.alpha_pattern": {...},
    "text_encoder.r": ...}

The keys hold no alpha. Without the header alpha is each module's rank (diffusers' rule); with it, diffusers passes each
component's entries to `peft.LoraConfig`, so its patterns are PEFT's. The level `text_model.` below "text_encoder." is
always written: transformers 5 has dropped it, and diffusers removes it if needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors, factors_of
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import AdapterError, listing
from ..io.json_object import parse_json
from ..io.tensors import write_tensors
from ..module_names import is_language_trunk
from . import flux_variants, kohya, kohya_metadata, lycoris, names
from .diffusers_header import KEY, HeaderAlphas, describe
from .families import family_of
from .format import Format, ReadOptions, WriteOptions
from .native import COMFYUI, flattened, spelled, written
from .peft_config import checked
from .pipeline_names import in_pipeline
from .run_metadata import own_entry, run_metadata
from .scale import clean, config_of, with_alpha_as_rank
from .spellings import COMPONENTS, MAGNITUDE, NATIVE, Name, is_spelling, parse, split
from .telling import size_of

FILE = "pytorch_lora_weights.safetensors"
_COMPONENTS = tuple(f"{component}." for component in (*COMPONENTS, NATIVE, "base_model"))
# Without one of these, diffusers cannot tell PEFT's spelling of a text encoder from older ones, and raises.
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def fits(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a diffusion model's LoRA with dotted module paths: one says so, or all end as a
    LoRA's tensors do and are no language model's.
    """
    keys = list(keys)
    if flux_variants.fits(keys) or any(key.startswith("text_encoders.") for key in keys):
        return True
    return any(map(is_spelling, keys)) or (bool(keys) and all(map(split, keys)) and family_of(keys) is None)


def read(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str], model: str | None = None) -> Adapter:
    """The adapter that these tensors are. AdapterError naming the key at fault.

    model: which of `names.KNOWN` it is for, where its names and widths do not tell; `kohya.OTHER` to keep its names.
    """
    saved: dict[str, Tensor] = {}
    if flux_variants.fits(tensors):
        tensors, saved = flux_variants.plain(path, tensors)
    alphas = HeaderAlphas(path, parse_json(header[KEY], f"{path}, {KEY} in its header") if KEY in header else {})
    native = None
    if model != kohya.OTHER:
        native = flattened(path, tensors | _alphas(tensors, alphas) if KEY in header else tensors, header, model)
    if native is not None:
        rest = {key: value for key, value in header.items() if key not in ("format", KEY)}
        adapter = kohya.read(path, native.tensors, rest, native.model)
        return replace(adapter, saved=saved, metadata=dict(adapter.metadata) | {"spelling": native.spelling}).check()
    if saved:
        raise AdapterError(f"{path}: it has Flux' norms ({listing(saved, 2)}), and modules that are not Flux'")
    modules = _sort(path, tensors, own=model == kohya.OTHER)
    updates = {module: _update(path, module, parts, alphas) for module, parts in modules.items()}
    metadata = parse_json(header.get("lorakit", "{}"), f"{path} (its header)")
    rest = {key: value for key, value in header.items() if key not in (KEY, "lorakit", "format")}
    metadata = {k: v for k, v in metadata.items() if k != "spelling"} | ({"header": rest} if rest else {})
    spelling = _spelling(tensors, updates)
    metadata |= {"spelling": spelling} if spelling else {}
    config = checked(path, lambda: _config(updates))
    return Adapter(config, updates, metadata=metadata).check()


def _alphas(tensors: Mapping[str, Tensor], alphas: HeaderAlphas) -> dict[str, Tensor]:
    """What the header says of the alphas of a denoiser's pairs, as keys of their own; rsLoRA's as that of alpha / r."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, suffix = split(key) or ("", "")
        name = parse(key)
        if suffix == "lora_up.weight" and tensor.dim() > 1 and name is not None and f"{path}.alpha" not in tensors:
            rank = tensor.shape[1]
            alpha, rslora = alphas.of(f"{name.component or 'transformer'}.{name.path}", rank)
            found[f"{path}.alpha"] = torch.tensor(alpha * math.sqrt(rank) if rslora else alpha, dtype=torch.float64)
    return found


def _spelling(tensors: Mapping[str, Tensor], updates: Mapping[str, Update]) -> dict[str, Any]:
    """How to write it back, where that is not diffusers' way: behind ComfyUI's component, or under its own names."""
    if not all(module.split(".")[0] in COMPONENTS for module in updates):
        return spelled(tensors) | {"own": True}
    for front in (f"{NATIVE}.", ""):
        if all(key.startswith(f"{NATIVE}.") if front else not key.startswith(_COMPONENTS) for key in tensors):
            return spelled(tensors) | {"front": front, "original": False, "text": "kohya"}
    return {}


def losses(adapter: Adapter) -> list[str]:
    """What diffusers' format cannot hold of this adapter, one line each."""
    adapter = in_pipeline(adapter)
    reasons: dict[str, list[str]] = {}
    for module in adapter.updates:
        reason = _unheld(adapter, module)
        if reason:
            reasons.setdefault(reason, []).append(module)
    lines = [f"{reason}: {listing(modules, 3)}" for reason, modules in reasons.items()]
    if adapter.saved:
        lines.append(f"diffusers' LoRA files hold no saved weights: {listing(adapter.saved, 3)}")
    if adapter.embeddings:
        lines.append(f"diffusers' LoRA files hold no textual-inversion embeddings: {listing(adapter.embeddings, 3)}")
    return lines


def write(adapter: Adapter, path: Path, *, fold: bool = True) -> Path:
    """Write a `.safetensors` file, or into a folder under diffusers' file name, and return its path. AdapterError, and
    nothing written, if the format cannot hold all of the adapter.

    fold: multiply each module's scale into its up matrix (alpha = rank), for programs that do not read the header, as
    ComfyUI. Without it the alphas are in the header alone.
    """
    adapter = in_pipeline(adapter)
    lost = losses(adapter)
    if lost:
        raise AdapterError("diffusers' format cannot hold all of this adapter:\n  " + "\n  ".join(lost))
    path = path if path.suffix == ".safetensors" else path / FILE
    updates = {m: u.map_factors(with_alpha_as_rank if fold else _plain) for m, u in adapter.check().updates.items()}
    plain = dict(updates)
    tensors: dict[str, Tensor] = {}
    for module in [m for m in plain if m.startswith(f"{NATIVE}.")]:  # an unknown model's, as ComfyUI names them
        update = plain.pop(module)
        shape = update.weight_shape() if update.changes_weight else ()
        tensors |= written(module, update, shape, adapter.metadata.get("spelling") or COMFYUI)
    described: dict[str, Any] = {}
    for component, modules in _by_component(plain).items():
        text = component.startswith("text_encoder")
        old = text and not any(module.endswith(_ATTENTION) for module in modules)
        down, up = (
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
            if old
            else (".lora_A.weight", ".lora_B.weight")
        )
        for module, update in modules.items():
            key, own = f"{component}.{module}", update.tensors()
            tensors[key + down], tensors[key + up] = own["A"], own["B"]
            if "magnitude" in own:
                # transformers reads a text encoder's magnitude with ".weight" in its name, PEFT a denoiser's without.
                axes = own["A"].dim()
                shaped = own["magnitude"].reshape((1, -1, *[1] * (axes - 2)) if axes > 2 else (-1,))
                tensors[f"{key}.{MAGNITUDE}" + (".weight" if text else "")] = shaped
        described |= {f"{component}.{name}": value for name, value in describe(modules).items()}
    header = {"format": "pt"} | ({KEY: json.dumps(described, sort_keys=True)} if described else {})
    if run_metadata(adapter.metadata):
        title = path.parent.name if path.name == FILE else path.stem
        changes = {m: (u, None) for m, u in updates.items()}
        header |= kohya_metadata.metadata(adapter, kohya.written_for(adapter), changes, title)
    write_tensors(path, tensors, header | own_entry(adapter.metadata, "spelling"))
    return path


def _sort(where: Path, tensors: Mapping[str, Tensor], own: bool = False) -> dict[str, dict[str, Tensor]]:
    """{module: {kohya's suffix: tensor}}, the modules with their component in front.

    Where no key tells its component the model is one that lorakit does not know, and its modules keep their names
    (`own`: even where one does).
    """
    found: dict[str, Name] = {}
    for key in tensors:
        name = parse(key)
        if name is None:
            what = next((w for n in (1, 2) if (w := lycoris.foreign(".".join(key.split(".")[-n:])))), None)
            if what is not None:
                raise AdapterError(f"{where}: key '{key}': {what}")
            raise AdapterError(
                f"{where}: key '{key}' is no part of an adapter that lorakit knows\n"
                "  expected <component>.<module>.lora_A.weight, .lora_B.weight, or another spelling of them, .alpha, "
                ".lora_magnitude_vector"
            )
        found[key] = name
    unprefixed = {name.component for name in found.values() if not name.prefixed} - {None}
    own = own or not any(name.component for name in found.values())
    modules: dict[str, dict[str, Tensor]] = {}
    for key, name in found.items():
        component = name.component or (next(iter(unprefixed)) if len(unprefixed) == 1 else None)
        if component is None and not own:
            raise AdapterError(
                f"{where}: key '{key}' does not name its model\n  expected one of {', '.join(COMPONENTS)} in front"
            )
        module = (split(key) or ("",))[0] if own else f"{component}.{name.path}"
        parts = modules.setdefault(module, {})
        if name.suffix in parts:
            raise AdapterError(f"{where}: key '{key}': a second {name.suffix} for '{module}'")
        parts[name.suffix] = tensors[key]
    return modules


def _update(where: Path, module: str, parts: dict[str, Tensor], alphas: HeaderAlphas) -> Update:
    """One module's update."""
    down, up = (parts.get(f"lora_{which}.weight") for which in ("down", "up"))
    rslora = False
    try:
        if down is None or up is None:
            known = (names.shapes(model)[module] for model in names.candidates([module]))
            shape = next(known, None)  # LyCORIS' kinds may not tell the kernel
            if shape is not None and size_of(parts) in (None, shape[:2]):
                update = lycoris.update(module, parts, shape)
                update.check(module)
                return update
        elif down.dim() < 2 or up.dim() < 2:
            raise AdapterError(
                f"'{module}' has a down of shape {list(down.shape)} and an up of {list(up.shape)}; expected matrices"
            )
        elif "alpha" not in parts:
            alpha, rslora = alphas.of(module, up.shape[1])
            parts = parts | {"alpha": torch.tensor(alpha, dtype=torch.float64)}
        if MAGNITUDE in parts:
            parts = {s: t for s, t in parts.items() if s != MAGNITUDE} | {"dora_scale": parts[MAGNITUDE].reshape(-1, 1)}
        update = lycoris.own_update(module, parts)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error
    return update.map_factors(lambda f: replace(f, rslora=True)) if rslora else update


def _unheld(adapter: Adapter, module: str) -> str | None:
    """Why this format does not hold a module's update, or None if it does."""
    component = module.split(".")[0]
    if component == NATIVE and not kohya.unholdable(replace(adapter, updates={module: adapter.updates[module]})):
        return None
    if is_language_trunk(module):
        return "these are modules of a language model, whose trunk is called transformer, and of no pipeline"
    if component not in COMPONENTS:
        return (
            f"diffusers' files name modules with a component in front ({', '.join(COMPONENTS[:2])}, text_encoder...), "
            "which these lack"
        )
    update, f = adapter.updates[module], adapter.updates[module].factors
    if f is None:
        return "diffusers' LoRA files hold low-rank factors only (`resize` converts any update)"
    if f.kind == "embedding" or f.groups > 1 or f.transposed:
        return "no model of diffusers has an adapted embedding, grouped convolution or transposed linear"
    if update.variant == "lora":
        return None
    if not update.outputs_independent:
        return "diffusers has DoRA's magnitude per output only, not per input"
    component = module.split(".")[0] + "."
    if any(u.variant == "lora" for name, u in adapter.updates.items() if name.startswith(component)):
        return "diffusers makes all modules of a component DoRA or none, and others of this one are not"
    return None


def _plain(f: Factors) -> Factors:
    """The factors with a scale of alpha / rows of A: without rsLoRA, and with a packed projection's parts written
    out.
    """
    if not f.rslora and not f.parts:
        return f
    return Factors(f.A, f.B, clean(f.scale * f.A.shape[0]), f.kind)


def _config(updates: Mapping[str, Update]) -> LoraConfig:
    factors = factors_of(updates)
    if not factors:
        return LoraConfig(targets=sorted({module.rsplit(".", 1)[-1] for module in updates}))
    return config_of(factors, rslora=any(f.rslora for f in factors.values()))


def _by_component(updates: Mapping[str, Update]) -> dict[str, dict[str, Update]]:
    """{component: {module's name within it: its update}}"""
    components: dict[str, dict[str, Update]] = {}
    for module, update in sorted(updates.items()):
        component, _, name = module.partition(".")
        components.setdefault(component, {})[name] = update
    return components


class Diffusers(Format):
    """diffusers' file, behind the interface of all formats."""

    name = "diffusers"
    tells_model = True
    files = (FILE,)

    def owns(self, path: Path) -> bool:
        return path.is_dir() and (path / FILE).is_file()

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        return fits(keys)

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(*self.tensors_in(path), options.model_type)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        if options.spelling is None:
            return write(adapter, path, fold=not options.keep_alpha)
        from .comfyui import write_as_read  # that file reads with this one

        return write_as_read(adapter, path, options.spelling)

    def holds(self, spelling: Mapping[str, Any]) -> bool:
        return "prefix" not in spelling


FORMAT = Diffusers()
