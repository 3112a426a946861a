"""`export_merged`: base and adapter as one GGUF model, for llama.cpp and Ollama.

    header, pairs (hyper-parameters, tokenizer), names and places of all tensors | then each tensor's numbers, block by block

Written under a temporary name, synced, renamed. What no adapter file can hold (DoRA, LoHa, LoKr, weights saved whole) is in the
merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter.adapter import Adapter
from ..bases.load import load_config, load_tokenizer
from ..checkpoint.base import Base, open_base
from ..checkpoint.changes import check_something
from ..checkpoint.merge import check_base
from ..checkpoint.out import check_space
from ..checkpoint.plan import make_plan
from ..errors import ConfigError, did_you_mean, listing
from ..formats.gguf_names import ARCHITECTURES, package
from ..formats.gguf_types import F32, KINDS, bytes_in, encode, type_of
from ..io.atomic import replacing, write_text
from .gguf_model import Placed, place
from .gguf_parameters import check_supported, parameters
from .gguf_tokenizer import vocabulary
from .merged_verify import Verified, verified
from .modelfile import check_place, modelfile

RECEIVERS = ("llama.cpp", "ollama")
PAIRS = 1 << 24  # bytes, for the tokenizer's
_FILE_TYPE = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's LLAMA_FTYPE


@dataclass(frozen=True)
class Merged:
    """What was written. `other`: matrices that are not in `dtype` because their rows do not fit its blocks."""

    receiver: str
    dtype: str
    files: list[Path]
    tensors: int
    bytes: int
    other: list[str]
    warnings: list[str]
    verified: Verified | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "format": "gguf", "merged": True, "files": [str(f) for f in self.files]}


def export_merged(
    adapter: Adapter | None,
    base: str | Path | None,
    out: str | Path,
    receiver: str = "llama.cpp",
    *,
    dtype: str = "f16",
    verify: bool = False,
    force_base: bool = False,
    force: bool = False,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Write BASE + ADAPTER as a GGUF model OUT; for Ollama a folder with it and a Modelfile (or OUT, and the Modelfile beside it).

    adapter: None gives the base alone, which a GGUF adapter goes onto. base: a transformers folder with its tokenizer. dtype: of the
    matrices, one of `KINDS`. verify: before it is put in its place, read the file again with the `gguf` package, compare each tensor
    with the merged weights, and logits where transformers loads such a file. force_base: write although the adapter was trained on
    another base. force: replace another Modelfile that is there. on_tensor(name, done, total): called after each tensor.
    Raises LorakitError for what does not fit, and for a file that is not what it should be; OUT is then as it was.
    """
    if base is None:
        raise ConfigError("a merged model needs its base\n  give it: --base FOLDER, the one with its config.json, weights and tokenizer")
    if dtype not in KINDS:
        raise ConfigError(f"dtype '{dtype}' is none that lorakit writes{did_you_mean(dtype, KINDS)}\n  known: {', '.join(KINDS)}")
    path = place_of(out, receiver)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; a GGUF model is one file")
    beside = check_place(path, modelfile(path), force) if receiver == "ollama" else None
    gguf = package()
    opened = open_base(Path(base).expanduser())
    check_supported(opened.model_type)
    plan = make_plan(opened, [] if adapter is None else [(1.0, adapter.check())], None, untie=True)
    told = [] if adapter is None else _left_out(adapter)
    if adapter is not None and not force_base:
        told += check_base(opened, adapter, plan.renames[0])
    config = load_config(str(opened.folder))
    if plan.untied:
        config.tie_word_embeddings = False
    name = opened.folder.resolve().name + (" with adapter" if adapter is not None else "")
    pairs, extra, warnings = _pairs(opened, config, dtype, name)
    placed = place(plan.entries, config, dtype)
    check_space(path.resolve(), sum(bytes_in(p.shape, p.kind) for p in placed) + PAIRS)
    checked = None
    with replacing(path) as temporary:
        _write(gguf, temporary, ARCHITECTURES[config.model_type].name, pairs, extra, placed, on_tensor)
        if verify:
            checked = verified(temporary, placed, extra, adapter, opened.folder, config, dtype)
    files = [path]
    if beside is not None:
        files.append(beside)
        write_text(beside, modelfile(path))
    other = [p.name for p in placed if len(p.shape) == 2 and p.kind not in (dtype, F32)]
    return Merged(receiver, dtype, files, len(placed) + len(extra), path.stat().st_size, other, told + warnings, checked)


def _left_out(adapter: Adapter) -> list[str]:
    """What of the adapter is in no weight. AdapterError where it changes none at all."""
    check_something(1.0, adapter)
    if not adapter.embeddings:
        return []
    return [
        f"learned tokens ({listing(adapter.embeddings, 3)}) are no change of a weight: they are not in the GGUF, and llama.cpp reads them from no other file"
    ]


def place_of(out: str | Path, receiver: str) -> Path:
    """The model's file: OUT, or in OUT where Ollama's folder is named. ConfigError for a receiver that reads no GGUF."""
    if receiver not in RECEIVERS:
        raise ConfigError(
            f"merged models are written as GGUF, for {' and '.join(RECEIVERS)}, which {receiver} does not read\n"
            "  lorakit merge BASE ADAPTER OUT writes a transformers or diffusers folder"
        )
    path = Path(out).expanduser()
    return path / "model.gguf" if receiver == "ollama" and path.suffix != ".gguf" else path


def _pairs(base: Base, config: Any, dtype: str, title: str) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """(pairs, tensors made of hyper-parameters, warnings)."""
    made = parameters(config)
    end = config.eos_token_id
    known = vocabulary(load_tokenizer(str(base.folder)), config.vocab_size, end[0] if isinstance(end, list) else end)
    name = ARCHITECTURES[config.model_type].name
    values = {
        "general.type": "model", "general.name": title, "general.file_type": _FILE_TYPE[dtype],
        "general.quantization_version": 2, **{f"{name}.{key}": value for key, value in made.pairs.items()}, **known.pairs,
    }  # fmt: skip
    extra = {} if made.rope_freqs is None else {"rope_freqs.weight": made.rope_freqs.numpy()}
    return values, extra, made.warnings + known.warnings


def _write(
    gguf: Any, path: Path, architecture: str, pairs: Mapping[str, Any], extra: Mapping[str, np.ndarray], placed: Sequence[Placed],
    on_tensor: Callable[[str, int, int], None] | None,
) -> None:  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    try:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        for key, value in pairs.items():
            add[type(value)](key, value)
        for name, numbers in extra.items():
            writer.add_tensor_info(name, numbers.shape, np.dtype(np.float32), numbers.nbytes)
        for p in placed:
            writer.add_tensor_info(p.name, p.shape, np.dtype(np.float32), bytes_in(p.shape, p.kind), type_of(p.kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with open(path, "ab") as file:
        _pad(file, writer.data_alignment)
        for name, numbers in extra.items():
            file.write(encode(numbers, F32, name).data)
            _pad(file, writer.data_alignment)
        for done, p in enumerate(placed, start=1):
            for block in p.blocks():
                file.write(encode(block, p.kind, p.name).data)
            _pad(file, writer.data_alignment)
            if on_tensor is not None:
                on_tensor(p.name, done, len(placed))


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
