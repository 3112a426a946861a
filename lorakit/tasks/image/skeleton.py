"""A pipeline without weights: its components from their configs, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...bases.load_pipeline import pipeline_path
from ...bases.pipeline import PipelineModel, as_module


def index(name: str, revision: str | None) -> dict[str, Any] | None:
    """Read a pipeline's model_index.json: component -> [library, class]. None for a single file, which has none."""
    import diffusers

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
    for component, value in index.items():
        library, kind = value if isinstance(value, list) and len(value) == 2 else (None, None)
        cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(kind), None)
        if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module) or component == "safety_checker":
            continue
        with torch.device("meta"):
            if library == "diffusers":
                built = cls.from_config(cls.load_config(path, subfolder=component, revision=revision))
            else:
                config = cls.config_class.from_pretrained(path, subfolder=component, revision=revision)
                built = cls._from_config(config)
        components[component] = torch.nn.Module.to(built, dtype=dtype)  # diffusers' own warns of meta tensors
    model: PipelineModel = as_module(_Bare(components))
    return model


class _Bare:
    """The components of a pipeline, without a call."""

    def __init__(self, components: dict[str, Any]):
        self.components = components
        vars(self).update(components)
