"""Latents and text embeddings on disk, under names that say what they were computed from.

    picture:  SHA-256 of (file's bytes, bucket, box, flip, background, the VAE's weights and config, VERSION)
    caption:  SHA-256 of (caption, the text encoders' weights and configs, the tokenizers, how the pipeline calls them,
              VERSION)

So an entry can never be stale: an edited picture, another size or another VAE has another name. Embeddings of a text
encoder that is being trained change with each step: do not cache those.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AdapterError, LorakitWarning, NotFiniteError
from ...io.tensors import read_tensors, write_tensors
from .item import Drawn, PictureItem

if TYPE_CHECKING:
    from torch import Tensor, nn

# Raise it whenever the pixels, the latents or the embeddings of the same inputs come out differently.
VERSION = 1


class TensorCache:
    """Tensors in a folder, a safetensors file for each key. Several processes may use one folder at once."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()

    def tensors(self, key: str, make: Callable[[], Mapping[str, Tensor]], where: str = "") -> dict[str, Tensor]:
        """Return the tensors under `key`, on the CPU; those not there yet are made and stored.

        A file that cannot be read is made again, with a LorakitWarning. `where`: names the picture or caption, for the
        NotFiniteError where a tensor has NaN or infinite elements; such tensors are never stored. Raises WriteError.
        """
        path = self.path(key)
        if path.exists():
            try:
                return read_tensors(path)[0]
            except AdapterError as error:
                warnings.warn(f"{error}; it is made again", LorakitWarning, stacklevel=2)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        check_finite(tensors, where or key)
        write_tensors(path, tensors)
        return tensors

    def path(self, key: str) -> Path:
        """Return the file of a key, in one of 256 folders, since thousands of files in one folder are slow to list."""
        return self.folder / key[:2] / f"{key}.safetensors"


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise NotFiniteError, naming `where`, if an element is NaN or infinite. Nothing is ever replaced by zeros."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"{where}: its {name} have {bad:,} elements of {tensor.numel():,} that are NaN or infinite\n"
                "  compute them in float32 or bfloat16 rather than float16"
            )


def picture_key(item: PictureItem, drawn: Drawn, vae: str) -> str:
    """Return the key of a picture's latents. `vae`: `weights_hash` of the VAE."""
    return _key("picture", item.content, item.group, drawn.box, drawn.flip, item.background, item.animated, vae)


def caption_key(caption: str, encoders: str) -> str:
    """Return the key of a caption's embeddings.

    `encoders`: `weights_hash` of the text encoders and tokenizers, and how the pipeline calls them (`encoding_of`).
    """
    return _key("caption", caption, encoders)


def weights_hash(*parts: nn.Module | Any) -> str:
    """Return the SHA-256 of modules' parameters, buffers and configs, and of tokenizers: any change gives another.

    Every byte is read (about a second for a gigabyte), so compute it once when the pipeline is loaded.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(type(part).__name__).encode())
        for chunk in _module_bytes(part) if hasattr(part, "state_dict") else _tokenizer_bytes(part):
            digest.update(chunk)
    return digest.hexdigest()


def _module_bytes(module: nn.Module) -> Iterable[Any]:
    import torch

    config = getattr(module, "config", None)
    if config is not None:
        values = config if isinstance(config, Mapping) else config.to_dict()
        # Where a model came from, and what wrote it, do not change what it computes.
        yield json.dumps({k: v for k, v in values.items() if not _is_origin(k)}, sort_keys=True, default=str).encode()
    for name, tensor in module.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        yield f"{name}/{plain.dtype}/{tuple(plain.shape)}".encode()
        yield plain.flatten().view(torch.uint8).numpy()


def _is_origin(name: str) -> bool:
    return name in ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "_diffusers_version")


def _tokenizer_bytes(tokenizer: Any) -> Iterable[bytes]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = (tokenizer.model_max_length, tokenizer.padding_side, sorted(tokenizer.special_tokens_map.items()))
    yield text.encode()
    yield repr(facts).encode()


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()
