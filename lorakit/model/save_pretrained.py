"""`save_pretrained` of a transformers model with adapters, for those who call it, such as transformers' `Trainer`.

    FOLDER/config.json, model.safetensors             the base, and under lorakit's names the adapters
    FOLDER/adapter_config.json, adapter_model.*       the active adapter, in PEFT's format
    FOLDER/NAME/adapter_config.json, ...              every other adapter, and any with virtual tokens

`from_pretrained(FOLDER)` gives the base with the active adapter: transformers finds the adapter beside the model and
loads it with peft. (Without peft it reports lorakit's names as unexpected.) The same folder loaded into the model with
its adapters attached, as `Trainer` resumes, restores both. A merged model is saved as the plain model that it is.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.virtual_tokens import BODY
from ..errors import AdapterError, LorakitWarning, StateError
from . import save_plain
from .capture import capture
from .state import State, is_adapter_key, names_of, saved_parameters, state_of

NAME = "save_pretrained"
CONFIG = "adapter_config.json"


def adopt(model: nn.Module) -> None:
    """Give a transformers model this `save_pretrained`, on the instance; `release` takes it back.

    diffusers' models and pipelines get that of `save_plain`.
    """
    own = getattr(type(model), NAME, None)
    if own is None or "state_dict" not in inspect.signature(own).parameters:
        save_plain.adopt(model)
    elif NAME not in model.__dict__:
        model.__dict__[NAME] = SavePretrained(model)


def release(model: nn.Module) -> None:
    """Give the model its class's own `save_pretrained` back."""
    if isinstance(model.__dict__.get(NAME), SavePretrained):
        del model.__dict__[NAME]
    save_plain.release(model)


class SavePretrained:
    """The model's own `save_pretrained`, and the adapters beside it. It does not keep the model alive."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return SavePretrained, (self._model(),)

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save the model and its adapters. Raises AdapterError, before anything is written, for an adapter that PEFT's
        format cannot hold, StateError for `push_to_hub`, and for a folder whose adapter would be applied to this model.
        """
        model: Any = self._model()
        if push_to_hub:
            raise StateError(
                "save_pretrained(..., push_to_hub=True) would upload the model without its adapters\n"
                "  call model.push_to_hub(REPOSITORY), which saves and uploads everything"
            )
        state = state_of(model)
        folder = Path(save_directory)
        adapters = _adapters(model, state, folder) if is_main_process and state.merged is None else {}
        if folder not in adapters and (folder / CONFIG).exists():
            raise StateError(
                f"{folder} holds an adapter ({CONFIG}), which transformers would load on top of this model\n"
                "  save into another folder"
            )
        if state.merged is not None:
            state_dict = _merged(model, state, state_dict)
        type(model).save_pretrained(
            model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options
        )
        for path, adapter in adapters.items():
            adapter.save(path)
        if folder in adapters and importlib.util.find_spec("peft") is None:
            warnings.warn(
                f"from_pretrained({folder}) applies the adapter only where peft is installed; here it is "
                "not, and the base alone would be loaded\n"
                "  pip install peft; or attach it: lorakit.attach(model, lorakit.Adapter.load(...))",
                LorakitWarning,
                stacklevel=2,
            )


def _adapters(model: Any, state: State, folder: Path) -> dict[Path, Adapter]:
    """Return the adapters by the folder that each is written to: the active one into `folder` itself."""
    from ..formats.peft import losses

    alone = next(iter(state.active)) if list(state.active.values()) == [1.0] else None
    if alone is not None and BODY in state.adapters[alone].modules:
        warnings.warn(
            f"adapter '{alone}' has virtual tokens, which transformers does not load: from_pretrained({folder}) will "
            "give the base alone. The adapter lies in a folder of its own: attach it, or load it with PEFT.",
            LorakitWarning,
            stacklevel=3,
        )
        alone = None
    elif alone is None and state.active:
        warnings.warn(
            f"{names_of(state.active)} is active, and transformers loads one adapter or none: from_pretrained({folder})"
            " will give the base alone, the adapters lie in folders of their own. Merge them first, or activate one.",
            LorakitWarning,
            stacklevel=3,
        )
    base = getattr(model, "name_or_path", None) or None
    placed: dict[Path, Adapter] = {}
    for name in state.adapters:
        adapter = capture(model, name)
        if adapter.config.base is None and base is not None:
            adapter = replace(adapter, config=adapter.config.replace(base=base))
        lost = losses(adapter)
        if lost:
            raise AdapterError(
                f"save_pretrained: PEFT's format cannot hold all of adapter '{name}'\n  " + "\n  ".join(lost)
            )
        own = name.replace("/", "∙").replace("\\", "∙")
        placed[folder if name == alone else folder / (f"_{own}" if own in (".", "..") else own)] = adapter
    return placed


def _merged(model: Any, state: State, given: dict[str, Any] | None) -> dict[str, Any]:
    """The state of the plain merged model: ΔW is in the weights, saved weights stand under the base's names."""
    values = {key: value for key, value in (given or model.state_dict()).items() if not is_adapter_key(key)}
    for name in state.merged or ():
        values |= {full: parameter.detach() for full, parameter in saved_parameters(model, state, name)}
    return values
