"""Load a diffusers pipeline: the embedded one, a folder, a single file of an original checkpoint, or a hub id.

The autoencoder is never in float16, in which SDXL's overflows: it stays in float32 unless the rest is in bfloat16.
A safety checker is never loaded: training and its samples do not use one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LorakitError, did_you_mean, listing, not_the_file
from .catching import arguments_of
from .hub_reach import check_hub, out_of_reach
from .load import EMBEDDED
from .pipeline import denoisers_of

if TYPE_CHECKING:
    import torch

EXPECTED = f"a diffusers pipeline's folder (model_index.json), a .safetensors checkpoint, a hub id, or '{EMBEDDED}'"
INDEX = "model_index.json"


def embedded_pipeline() -> Path:
    """Return the embedded pipeline's folder, inside the package."""
    return Path(__file__).parent.parent / "assets" / "tiny-diffusion"


def load_pipeline(name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> Any:
    """Load a text-to-image pipeline onto `device`, in eval mode, without progress bars.

    `name`: 'embedded', a folder with model_index.json, a .safetensors file with a whole checkpoint in its original
    names (its configuration and tokenizers come from the hub or its cache), or a hub id. `dtype`: of the denoisers and
    text encoders; the autoencoder's is float32 where it is float16. `revision`: of a hub id.

    Raises LorakitError if diffusers is not installed, for anything that is no text-to-image pipeline, and for a
    revision of a folder or file.
    """
    diffusers = import_diffusers()
    path = pipeline_path(name)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision}
    file = Path(path)
    if revision is not None and file.exists():
        raise LorakitError(f"revision is '{revision}', but {name} is on this disk: only hub ids have revisions")
    with _failures_named(name, file), _quietly(diffusers, local=file.exists()):
        if file.is_file():
            pipe = _from_single_file(diffusers, file, options)
        else:
            if file.is_dir() or out_of_reach() is not None:  # else the library would retry for half a minute
                options |= {"local_files_only": True}
            index = diffusers.DiffusionPipeline.load_config(path, **_without(options, "dtype"))
            _pipeline_class(diffusers, index)
            pipe = diffusers.DiffusionPipeline.from_pretrained(path, **options, **_unsafe(index))
    arguments = arguments_of(pipe)
    if "prompt" not in arguments or "latents" not in arguments:
        raise LorakitError(
            f"'{name}' is a {type(pipe).__name__}, which makes no picture from a prompt\n  expected {EXPECTED}"
        )
    denoisers_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    _place(pipe, dtype, device)
    return pipe


def pipeline_path(name: str) -> str:
    """Return what to pass to diffusers: a folder or file that exists, or `name` as a hub id. Raises LorakitError."""
    path = embedded_pipeline() if name == EMBEDDED else Path(name).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise LorakitError(f"{name} is no pipeline's folder: {INDEX} is missing{_what_it_is(path)}")
        return str(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LorakitError(f"{name} is a file, but no .safetensors\n  expected {EXPECTED}")
        return str(path)
    if name == EMBEDDED:
        raise LorakitError("the embedded pipeline is missing from this installation: install lorakit again")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".safetensors":
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LorakitError(f"there is no pipeline '{name}'{did_you_mean(path.name, siblings)}\n  expected {EXPECTED}")
    check_hub(name, EXPECTED)
    return name


def import_diffusers() -> Any:
    """Return the library. Raises LorakitError, which says how to install it."""
    try:
        import diffusers

        with _no_word_of_packages():
            diffusers.DiffusionPipeline  # noqa: B018  (imported when first named)
    except ImportError as error:
        raise LorakitError(
            f"pictures need diffusers, which is not installed ({error})\n  pip install 'lorakit[image]'"
        ) from error
    return diffusers


def _what_it_is(path: Path) -> str:
    """Say what a folder without model_index.json holds, with the fix."""
    if (path / "adapter_config.json").is_file():
        return "\n  it is an adapter (adapter_config.json): give its base as the model"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        within = [p.name for p in sorted(path.iterdir()) if (p / INDEX).is_file()]
        return f"\n  did you mean {path / within[0]}?" if within else f"\n  expected {EXPECTED}"
    if isinstance(config, dict) and config.get("_class_name"):
        return (
            f"\n  it is one component of a pipeline ({config['_class_name']}): give the folder that holds all of them"
        )
    kind = next(iter(config.get("architectures") or []), "a model") if isinstance(config, dict) else "a model"
    return f"\n  it is {kind} of transformers, no picture pipeline: lorakit train takes it with a task for text"


def _unsafe(index: Any) -> dict[str, Any]:
    """Return the arguments that leave the safety checker out, for the pipelines that have one."""
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}


def _from_single_file(diffusers: Any, file: Path, options: dict[str, Any]) -> Any:
    """Load a checkpoint in its original names. The base's configuration says which pipeline it is."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    wrong = not_the_file(file)
    if wrong is not None:
        raise LorakitError(wrong)
    base = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    check_hub(base, f"the configuration of {base}, which {file.name} needs beside its weights")
    local = {"local_files_only": True} if out_of_reach() is not None else {}
    index = diffusers.DiffusionPipeline.load_config(base, **local)
    pipeline_class = _pipeline_class(diffusers, index)
    given = _without(options, "revision")
    return pipeline_class.from_single_file(str(file), config=base, **given, **local, **_unsafe(index))


def _pipeline_class(diffusers: Any, index: Any) -> Any:
    """Return the class that an index names, None if diffusers has none."""
    with _no_word_of_packages():
        return getattr(diffusers, str(index.get("_class_name")), None)


@contextmanager
def _no_word_of_packages() -> Iterator[None]:
    """Within the block, an import does not mention the packages that some pipelines could use and this one may not."""
    from transformers.utils import logging as transformers_logging

    said, quantizer = transformers_logging.get_verbosity(), logging.getLogger("bitsandbytes")
    level = quantizer.level
    transformers_logging.set_verbosity_error()
    quantizer.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(said)
        quantizer.setLevel(level)


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _place(pipe: Any, dtype: torch.dtype, device: torch.device) -> None:
    import torch

    pipe.to(device)
    vae = getattr(pipe, "vae", None)
    if vae is not None and dtype == torch.float16:
        vae.to(torch.float32)
        # The pipelines hand it latents of their own precision.
        for name in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
            part = getattr(vae, name, None)
            if isinstance(part, torch.nn.Module):
                part.register_forward_pre_hook(_in_float32)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()


def _in_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if hasattr(x, "is_floating_point") and x.is_floating_point() else x for x in inputs)


@contextmanager
def _failures_named(name: str, path: Path) -> Iterator[None]:
    """Turn what the libraries raise at damaged or missing files into a LorakitError."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise bare Exceptions, KeyErrors and more
        files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else []
        wrong = next(filter(None, map(not_the_file, files)), None)
        if wrong is not None:
            raise LorakitError(f"cannot load the pipeline '{name}': {wrong}") from error
        missing = _missing(path)
        if missing:
            raise LorakitError(f"cannot load the pipeline '{name}': it lacks {listing(missing)}") from error
        reason = next(iter(str(error).strip().splitlines()), "")
        raise LorakitError(
            f"cannot load the pipeline '{name}': {type(error).__name__}: {reason}\n  expected {EXPECTED}"
        ) from error


def _missing(path: Path) -> list[str]:
    """Return the components that a folder's model_index.json names and the folder lacks."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return []
    named = [n for n, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] and n != "safety_checker"]
    return [name for name in named if not (path / name).is_dir()]


@contextmanager
def _quietly(diffusers: Any, local: bool) -> Iterator[None]:
    """Hide the progress bars of loading local files; downloads keep theirs. Warnings stay."""
    from transformers.utils import logging as transformers_logging

    logs = [diffusers.utils.logging, transformers_logging]
    hidden = [log for log in logs if local and log.is_progress_bar_enabled()]
    for log in hidden:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in hidden:
            log.enable_progress_bar()
