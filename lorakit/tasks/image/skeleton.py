"""A pipeline without weights: its components from their configs, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...bases.load_pipeline import import_diffusers, pipeline_path
from ...bases.pipeline import PipelineModel, as_module


def index(name: str, revision: str | None) -> dict[str, Any] | None:
    """Read a pipeline's model_index.json: component -> [library, class]. None for a single file, which has none."""
    diffusers = import_diffusers()
    path = Path(pipeline_path(name))
    if path.is_file():
        return None
    local = {"local_files_only": True} if path.is_dir() else {"revision": revision}
    found: dict[str, Any] = dict(diffusers.DiffusionPipeline.load_config(str(path), **local))
    return found


def skeleton(name: str, revision: str | None, index: dict[str, Any], dtype: torch.dtype) -> PipelineModel:
    """Build the pipeline's models on the meta device. Its tokenizers and its scheduler are left out."""
    import diffusers
    import transformers

    path = pipeline_path(name)
    components: dict[str, Any] = {}
    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    for component, value in index.items():
        library, kind = value if isinstance(value, list) and len(value) == 2 else ("", "")
        cls: Any = getattr(libraries.get(library or ""), kind or "", None)
        if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module) or component == "safety_checker":
            continue
        built: Any
        with torch.device("meta"):
            if library == "diffusers":
                built = _diffusers_model(cls, path, component, revision)
            else:
                built = _transformers_model(cls, path, component, revision)
        components[component] = torch.nn.Module.to(built, dtype=dtype)  # diffusers' own warns of meta tensors
    model: PipelineModel = as_module(_Bare(components))
    return model


def _diffusers_model(cls: Any, path: str, component: str, revision: str | None) -> Any:
    return cls.from_config(cls.load_config(path, subfolder=component, revision=revision))


def _transformers_model(cls: Any, path: str, component: str, revision: str | None) -> Any:
    return cls._from_config(cls.config_class.from_pretrained(path, subfolder=component, revision=revision))


class _Bare:
    """The components of a pipeline, without a call."""

    def __init__(self, components: dict[str, Any]):
        self.components = components
        vars(self).update(components)
