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
from collections.abc import Iterable, Mapping
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
from . import kohya, lycoris, names
from .diffusers_header import KEY, HeaderAlphas, describe
from .peft_config import checked
from .scale import clean, config_of, folded
from .spellings import COMPONENTS, MAGNITUDE, NATIVE, Name, is_spelling, parse

FILE = "pytorch_lora_weights.safetensors"
# Without one of these, diffusers cannot tell PEFT's spelling of a text encoder from older ones, and raises.
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def fits(keys: Iterable[str]) -> bool:
    """Whether these are keys of a diffusion model's LoRA with dotted module paths."""
    return any(map(is_spelling, keys))


def read(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """The adapter of these tensors and this header. AdapterError naming the file and the key at fault."""
    flat = _native(tensors)
    if flat is not None:
        return kohya.read(path, flat, {key: value for key, value in header.items() if key != "format"})
    alphas = HeaderAlphas(path, parse_json(header[KEY], f"{path}, {KEY} in its header") if KEY in header else {})
    updates = {module: _update(path, module, parts, alphas) for module, parts in _sort(path, tensors).items()}
    metadata = parse_json(header.get("lorakit", "{}"), f"{path} (its header)")
    rest = {key: value for key, value in header.items() if key not in (KEY, "lorakit", "format")}
    metadata = metadata | ({"header": rest} if rest else {})
    config = checked(path, lambda: _config(updates))
    return Adapter(config, updates, metadata=metadata).check()


def losses(adapter: Adapter) -> list[str]:
    """What diffusers' format cannot hold of this adapter, one line each."""
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


def write(adapter: Adapter, path: Path, *, fold: bool = False) -> Path:
    """Write a `.safetensors` file, or into a folder under diffusers' file name, and return its path. AdapterError, and
    nothing written, if the format cannot hold all of the adapter.

    fold: multiply each module's scale into its up matrix (alpha = rank), for programs that do not read the header.
    """
    lost = losses(adapter)
    if lost:
        raise AdapterError("diffusers' format cannot hold all of this adapter:\n  " + "\n  ".join(lost))
    path = path if path.suffix == ".safetensors" else path / FILE
    plain = {m: u.map_factors(with_alpha_as_rank if fold else _plain) for m, u in adapter.check().updates.items()}
    tensors: dict[str, Tensor] = {}
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
    header = {"format": "pt", KEY: json.dumps(described, sort_keys=True)}
    if adapter.metadata:
        header["lorakit"] = json.dumps(dict(adapter.metadata), sort_keys=True)
    write_tensors(path, tensors, header)
    return path


def _sort(where: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module with its component in front: {kohya's suffix: tensor}}. AdapterError for unknown or repeated keys."""
    found: dict[str, Name] = {}
    for key in tensors:
        name = parse(key)
        if name is None:
            raise AdapterError(
                f"{where}: key '{key}' is no part of an adapter that lorakit knows\n"
                "  expected <component>.<module>.lora_A.weight, .lora_B.weight, or another spelling of them, .alpha, "
                ".lora_magnitude_vector"
            )
        found[key] = name
    unprefixed = {name.component for name in found.values() if not name.prefixed} - {None}
    modules: dict[str, dict[str, Tensor]] = {}
    for key, name in found.items():
        component = name.component or (next(iter(unprefixed)) if len(unprefixed) == 1 else None)
        if component is None:
            raise AdapterError(
                f"{where}: key '{key}' does not name its model\n  expected one of {', '.join(COMPONENTS)} in front"
            )
        parts = modules.setdefault(f"{component}.{name.path}", {})
        if name.suffix in parts:
            raise AdapterError(f"{where}: key '{key}': a second {name.suffix} for '{component}.{name.path}'")
        parts[name.suffix] = tensors[key]
    return modules


def _update(where: Path, module: str, parts: dict[str, Tensor], alphas: HeaderAlphas) -> Update:
    """One module's update. AdapterError naming the file and the key at fault."""
    down, up, mid = (parts.get(f"lora_{which}.weight") for which in ("down", "up", "mid"))
    rslora = False
    if down is None or up is None:
        shape = next(
            (names.shapes(model)[module] for model in names.candidates([module])), (0, 0)
        )  # the tensors of LyCORIS' kinds may not show the kernel
    elif down.dim() < 2 or up.dim() < 2:
        raise AdapterError(
            f"{where}: '{module}' has a down of shape {list(down.shape)} and an up of {list(up.shape)}; expected "
            "matrices"
        )
    else:
        shape = (up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])
        if "alpha" not in parts:
            alpha, rslora = alphas.of(module, up.shape[1])
            parts = parts | {"alpha": torch.tensor(alpha, dtype=torch.float64)}
    if MAGNITUDE in parts:
        parts = {s: t for s, t in parts.items() if s != MAGNITUDE} | {"dora_scale": parts[MAGNITUDE].reshape(-1, 1)}
    try:
        update = lycoris.update(module, parts, shape)
        update.check(module)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error
    return update.map_factors(lambda f: replace(f, rslora=True)) if rslora else update


def _native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """ComfyUI's tensors under kohya's keys: both use the original code's names, kohya with underscores.

    None if they are not all of one known model.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = parse(key)
        if name is None or name.component != NATIVE:
            return None
        found[f"lora_unet_{name.path.replace('.', '_')}.{name.suffix}"] = tensor
    known = [set(names.modules_of(model)) for model in names.MODELS]
    modules = {key.partition(".")[0] for key in found}
    return found if len(found) == len(tensors) and any(modules <= one for one in known) else None


def _unheld(adapter: Adapter, module: str) -> str | None:
    """Why diffusers' format cannot hold a module's update; None if it can."""
    if is_language_trunk(module):
        return "these are modules of a language model, whose trunk is called transformer, and of no pipeline"
    if module.split(".")[0] not in COMPONENTS:
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


def with_alpha_as_rank(f: Factors) -> Factors:
    """The factors with their scale folded into B (alpha = rank); in float32 if B's dtype would round it."""
    B = folded(f.B, f.scale)
    return Factors(f.A.to(torch.promote_types(f.A.dtype, B.dtype)), B, f.A.shape[0], f.kind)


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
