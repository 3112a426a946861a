"""`export_merged`: base and adapter as one GGUF model, for llama.cpp and Ollama.

    header, key-value pairs (hyper-parameters, tokenizer), names and offsets of all tensors | each tensor's data, block
    by block

The file is written beside OUT, synced and renamed (`io.staging`). Updates that a GGUF adapter cannot hold (DoRA, LoHa,
LoKr, saved modules) become part of the merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter.adapter import Adapter
from ..bases.load import load_config, load_tokenizer
from ..bases.rope import record_of
from ..checkpoint.base import Base, open_base
from ..checkpoint.changes import check_mergeable
from ..checkpoint.merge import check_base
from ..checkpoint.merge_plan import make_plan
from ..checkpoint.out import check_space
from ..data.chat_record import ChatRecord
from ..data.templates import with_template
from ..errors import AdapterError, ConfigError, did_you_mean, listing
from ..formats.gguf_names import ARCHITECTURES, package
from ..formats.gguf_types import F32, KINDS, bytes_in, encode, type_of
from ..io.atomic import write_text
from ..io.staging import staged
from .gguf_model import GgufTensor, gguf_tensors
from .gguf_parameters import check_supported, parameters
from .gguf_tokenizer import vocabulary
from .merged_verify import Verified, verified
from .modelfile import check_modelfile, modelfile

RECEIVERS = ("llama.cpp", "ollama")
PAIRS_BYTES = 1 << 24  # disk space reserved for the key-value pairs (mostly the tokenizer)
_FILE_TYPE = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's LLAMA_FTYPE


@dataclass(frozen=True)
class Merged:
    """What was written. `other`: matrices not stored in `dtype` because their row length does not fit its blocks."""

    receiver: str
    dtype: str
    files: list[Path]
    tensors: int
    bytes: int
    other: list[str]
    warnings: list[str]
    verified: Verified | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
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
    """Merge `adapter` into `base` and write a GGUF model to `out`; for Ollama, also a Modelfile (see `model_path`).

    adapter: None writes the base alone, to load a GGUF adapter onto.
    base: a transformers folder with its tokenizer; quantized weights (bitsandbytes, GPTQ, AWQ) are dequantized.
    dtype: type of the matrices, one of `KINDS`.
    verify: before moving the file into place, read it with the `gguf` package and compare each tensor with the merged
        weights, and logits if transformers can load the file.
    force_base: accept an adapter trained on another base.
    force: replace an existing Modelfile with other content.
    on_tensor(name, done, total): called after each tensor.

    Raises ConfigError for a missing base, a bad `dtype`, `receiver` or `out`, and LorakitError for a base or adapter
    that cannot be written or a file that fails verification. OUT is unchanged after an error.
    """
    if base is None:
        raise ConfigError(
            "a merged model needs its base\n  give --base FOLDER, with config.json, weights and tokenizer"
        )
    if dtype not in KINDS:
        raise ConfigError(
            f"dtype '{dtype}' is not supported{did_you_mean(dtype, KINDS)}\n  expected one of {', '.join(KINDS)}"
        )
    path = model_path(out, receiver)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a file name for the GGUF model")
    model_file = check_modelfile(path, modelfile(path, adapter=adapter), force) if receiver == "ollama" else None
    gguf = package()
    opened = open_base(Path(base).expanduser(), quantized=True)
    check_supported(opened.model_type)
    plan = make_plan(opened, [] if adapter is None else [(1.0, adapter.check())], None, untie=True)
    if plan.grown is not None:
        raise AdapterError(
            f"the adapter has tokens that {opened.folder} has no row for\n"
            "  merge it first, which gives the model these rows and its tokenizer the tokens (lorakit merge); then "
            "export the result"
        )
    notes = [] if adapter is None else _left_out(adapter)
    if adapter is not None and not force_base:
        notes += check_base(opened, adapter, plan.renames[0])
    scaling = None if adapter is None else record_of(adapter.metadata)
    config = load_config(str(opened.folder), rope_scaling=scaling)
    if plan.untied:
        config.tie_word_embeddings = False
    name = opened.folder.resolve().name + (" with adapter" if adapter is not None else "")
    pairs, extra, warnings = _pairs(opened, config, dtype, name, adapter)
    tensors = gguf_tensors(plan.entries, config, dtype)
    verification = None
    with staged(path) as temporary:
        check_space(temporary, sum(bytes_in(t.shape, t.kind) for t in tensors) + PAIRS_BYTES)
        _write(gguf, temporary, ARCHITECTURES[config.model_type].name, pairs, extra, tensors, on_tensor)
        if verify:
            verification = verified(temporary, tensors, extra, adapter, opened.folder, config, dtype)
        if model_file is not None:
            write_text(temporary.with_name(model_file.name), modelfile(path, adapter=adapter))
    files = [path, *([model_file] if model_file is not None else [])]
    other = [t.name for t in tensors if len(t.shape) == 2 and t.kind not in (dtype, F32)]
    return Merged(
        receiver, dtype, files, len(tensors) + len(extra), path.stat().st_size, other, notes + warnings, verification
    )


def _left_out(adapter: Adapter) -> list[str]:
    """Return notes on what merging leaves out. Raises AdapterError if the adapter changes no weight at all."""
    check_mergeable(1.0, adapter)
    if not adapter.embeddings:
        return []
    return [
        f"left out: textual-inversion embeddings ({listing(adapter.embeddings, 3)}), which are not part of any weight "
        "and which llama.cpp cannot load"
    ]


def model_path(out: str | Path, receiver: str) -> Path:
    """Return the path of the GGUF model: `out`, or model.gguf in it if `out` is Ollama's folder.

    Raises ConfigError for a receiver without GGUF.
    """
    if receiver not in RECEIVERS:
        raise ConfigError(
            f"merged models are GGUF files for {' and '.join(RECEIVERS)}, which {receiver} does not read\n"
            "  lorakit merge BASE ADAPTER OUT writes a transformers or diffusers folder"
        )
    path = Path(out).expanduser()
    return path / "model.gguf" if receiver == "ollama" and path.suffix != ".gguf" else path


def _pairs(
    base: Base, config: Any, dtype: str, title: str, adapter: Adapter | None
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """Return (key-value pairs, tensors computed from hyper-parameters, warnings)."""
    params = parameters(config)
    eos = config.eos_token_id
    record = ChatRecord() if adapter is None else ChatRecord.of(adapter.metadata)
    tokenizer = with_template(load_tokenizer(str(base.folder)), record.template)
    vocab = vocabulary(tokenizer, config.vocab_size, eos[0] if isinstance(eos, list) else eos)
    ends = tokenizer.convert_tokens_to_ids(list(record.end_tokens))
    name = ARCHITECTURES[config.model_type].name
    values = {
        "general.type": "model",
        "general.name": title,
        "general.file_type": _FILE_TYPE[dtype],
        "general.quantization_version": 2,
        **{f"{name}.{key}": value for key, value in params.pairs.items()},
        **vocab.pairs,
        # llama.cpp ends generation at this one too.
        **({"tokenizer.ggml.eot_token_id": int(ends[0])} if ends and ends[0] is not None else {}),
    }
    extra = {} if params.rope_freqs is None else {"rope_freqs.weight": params.rope_freqs.numpy()}
    return values, extra, params.warnings + vocab.warnings + record.to_pass_on(with_template=True)


def _write(
    gguf: Any,
    path: Path,
    architecture: str,
    pairs: Mapping[str, Any],
    extra: Mapping[str, np.ndarray],
    tensors: Sequence[GgufTensor],
    on_tensor: Callable[[str, int, int], None] | None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in pairs.items():
            add[type(value)](key, value)
        for name, array in extra.items():
            writer.add_tensor_info(name, array.shape, np.dtype(np.float32), array.nbytes)
        for t in tensors:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), bytes_in(t.shape, t.kind), type_of(t.kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with open(path, "ab") as file:
        _pad(file, writer.data_alignment)
        for name, array in extra.items():
            file.write(encode(array, F32, name).data)
            _pad(file, writer.data_alignment)
        for done, t in enumerate(tensors, start=1):
            for block in t.blocks():
                file.write(encode(block, t.kind, t.name).data)
            _pad(file, writer.data_alignment)
            if on_tensor is not None:
                on_tensor(t.name, done, len(tensors))


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
