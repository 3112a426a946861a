"""Find the adapter in a folder, and say what a folder or file holds instead.

A folder with one adapter in it stands for that adapter: a run's folder for its `adapter/` (or its newest checkpoint, if
it has not finished), a download for its only adapter file. If there are several, or a model, the error names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from ..errors import AdapterError, listing, not_the_file
from ..io.json_object import read_json
from .families import family_of

ADAPTER_CONFIG, DIFFUSERS_FILE = "adapter_config.json", "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SUFFIXES = {".safetensors", ".npz", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}
_SIDES = (".text_encoder.pt", ".ti.pt")  # belong to the file that is named like them
# prefixes of their names, also for shards and indices
_MODEL_WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model")
OURS, FILE_KEY = "lorakit.json", "file"
_RUN = "config.yaml"  # a training run's or, beside it, a sweep's
_STEP = "step-"  # a run's checkpoint
MOST_OPENED = 50  # files: in larger folders every candidate counts as an adapter, unopened
_ADAPTER_MARKS = ("lora", "hada_", "lokr_", "oft_", "ia3_", "boft_", "vera_")
_LDM = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")


def adapter_in(folder: Path) -> Path:
    """The path of a folder's adapter: the folder itself, or a folder or file in it. AdapterError if there are several
    or none.
    """
    own = _own_adapter(folder)
    if own is None and (folder / _RUN).is_file():
        own = _own_adapter(folder / "adapter")
    if own is not None:
        return own
    newest = newest_checkpoint(folder)
    if newest is not None:
        return _own_adapter(newest) or newest
    folders = sorted(p.parent for p in folder.glob(f"*/{ADAPTER_CONFIG}"))
    config = _model_config(folder)
    if config is not None:
        raise AdapterError(_model_folder(folder, config, folders))
    found = [*folders, *_adapter_files(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(
            f"{folder} holds {len(found)} adapters: {listing([p.name for p in found], 8)}\n"
            f"  give one of them, for example {found[0]}"
        )
    if (folder / _RUN).is_file() and (folder / "checkpoints").is_dir():
        raise AdapterError(
            f"{folder} is the folder of a run that has not finished: it has no adapter/ and no checkpoint yet\n"
            "  let it finish; to resume a stopped run, repeat the command that started it"
        )
    if any((folder / name).is_file() for name in _PEFT_WEIGHTS):
        raise AdapterError(
            f"{folder} holds PEFT's weights without their {ADAPTER_CONFIG}, which says alpha and more\n"
            "  put that file beside them"
        )
    for file in sorted(p for p in folder.iterdir() if p.is_file())[:MOST_OPENED]:
        stands_in = not_the_file(file)
        if stands_in is not None:
            raise AdapterError(stands_in)
    there = sorted(p.name for p in folder.iterdir())
    raise AdapterError(
        f"{folder} is no adapter: the folder has no {ADAPTER_CONFIG}, and none of its files is an adapter"
        + (f"; it holds {listing(there, 5)}" if there else "; it is empty")
    )


def _own_adapter(folder: Path) -> Path | None:
    """The path of the adapter whose own folder this is: the folder, if it is PEFT's or diffusers', or the file that its
    lorakit.json names (`FILE_KEY`), as runs on pictures write it. None for any other folder.
    """
    if (folder / ADAPTER_CONFIG).is_file() or (folder / DIFFUSERS_FILE).is_file():
        return folder
    try:
        name = read_json(folder / OURS).get(FILE_KEY)
    except AdapterError:
        return None  # then the folder is judged by its files
    file = folder / name if isinstance(name, str) and Path(name).name == name else None
    return file if file is not None and file.is_file() else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is an adapter, of a run's folder without a result; None for any other folder."""
    if not (folder / _RUN).is_file() or (folder / "adapter").is_dir() or (folder / "model").is_dir():
        return None
    steps = {
        int(path.name.removeprefix(_STEP)): path
        for path in folder.glob(f"checkpoints/{_STEP}*")
        if path.name.removeprefix(_STEP).isdigit() and _own_adapter(path) is not None
    }
    return steps[max(steps)] if steps else None


def not_adapter(keys: Sequence[str], path: Path) -> str:
    """The error message for a file whose tensors are in no known format: often a model."""
    if any(mark in key for key in keys for mark in _ADAPTER_MARKS) or any(
        key.endswith((".diff", ".diff_b")) for key in keys
    ):
        family = family_of(keys)
        looks = f" (by its keys, {listing(keys, 1)}: PEFT's LoRA of {family})" if family else ""
        if path.name in _PEFT_WEIGHTS:
            return (
                f"{path} is without its {ADAPTER_CONFIG}, which holds alpha and more{looks}\n  put that file beside it"
            )
        if family and (path.parent / ADAPTER_CONFIG).is_file():
            return (
                f"{path} has another name than PEFT's weights beside an {ADAPTER_CONFIG}{looks}\n"
                f"  rename it: mv {quote(path.name)} adapter_model{path.suffix}, and give the folder"
            )
        if family:
            return (
                f"{path}: its keys ({listing(keys, 1)}) are those of PEFT's LoRA of {family}, whose alpha is in an "
                f"{ADAPTER_CONFIG}\n  put that file beside it, call this one adapter_model{path.suffix}, and give the "
                "folder"
            )
    elif any(key.startswith(_LDM) for key in keys):
        return f"{path} is a diffusion model (it has {listing(keys, 2)}), not an adapter\n  give a LoRA made for it"
    elif len(keys) > 1 and 2 * sum(key.endswith((".weight", ".bias")) for key in keys) > len(keys):
        known = (path.parent / "config.json").is_file()
        todo = _NEXT.format(folder=path.parent) if known else "  give a LoRA made for that model"
        return f"{path} holds a model's weights ({listing(keys, 2)}), not an adapter\n{todo}"
    return f"{path} is no adapter in a format that lorakit knows: its tensors are {listing(keys, 3)}"


def renamed(folder: Path, stem: str, suffixes: Sequence[str]) -> str:
    """What to say where a folder lacks the weights `stem`: which file there can be them, under another name."""
    there = sorted(p.name for p in folder.iterdir() if stem in p.name.lower() and p.suffix in suffixes)
    if not there:
        return ""
    best = there[-1]  # of numbered ones the last
    to = f"{stem}{Path(best).suffix}"
    return f"\n  there is {listing(there, 3)}: rename it to {to} (mv {quote(best)} {to})"


_NEXT = (
    "  an adapter's file or folder is expected here; the modules that the model has: lorakit inspect {folder} "
    "--modules\n"
    "  what a fine-tuned model changed, as an adapter: lorakit extract BASE {folder} OUT"
)


def _model_folder(folder: Path, config: str, adapters: Sequence[Path]) -> str:
    if adapters:
        return (
            f"{folder} is a model ({config}), not an adapter\n"
            f"  there is one inside it: {listing(map(str, adapters), 3)}"
        )
    if config == "model_index.json":
        return f"{folder} is a diffusion pipeline ({config}), not an adapter\n  give a LoRA made for it"
    return f"{folder} is a model ({config}), not an adapter\n{_NEXT.format(folder=folder)}"


def _model_config(folder: Path) -> str | None:
    """The name of the config if a folder holds a model or pipeline; None if not. A config.json alone does not count:
    LoRA files may have one beside them.
    """
    if (folder / "model_index.json").is_file():
        return "model_index.json"
    weights = any(p.name.startswith(_MODEL_WEIGHTS) for p in folder.iterdir())
    return "config.json" if weights and (folder / "config.json").is_file() else None


def _adapter_files(folder: Path) -> list[Path]:
    """The files of a folder that are adapters of a known format."""
    from . import format_of

    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file() and not p.name.startswith("."))
    files = [
        p
        for p in files
        if not any(p.name.endswith(s) and p.with_name(p.name.removesuffix(s) + ".pt") in files for s in _SIDES)
    ]
    if len(files) > MOST_OPENED:
        return files
    found = []
    for file in files:
        try:
            format_of(file)
        except AdapterError:
            continue
        found.append(file)
    return found
