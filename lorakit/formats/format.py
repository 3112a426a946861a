"""The interface of a file format. Each format's file defines a class of it and `FORMAT`, the one object of that class.

A format's own `read`, `losses` and `write` take what that format needs; here all formats have the same signatures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..adapter.adapter import Adapter
from ..errors import AdapterError
from .inside import ADAPTER_CONFIG, DIFFUSERS_FILE, renamed
from .wrappers import read_unwrapped


@dataclass(frozen=True)
class ReadOptions:
    """What a file may lack, given by the caller; see `formats.load`."""

    alpha: float | None = None
    packed: dict[str, list[bool]] | None = None
    base: Any = None
    model_type: str | None = None


@dataclass(frozen=True)
class WriteOptions:
    """How to write; see `formats.save`.

    blocks: the type of GGUF's blocks, None for each tensor's own precision. keep_alpha: write alphas as they are;
    without it kohya's and diffusers' files have them folded into B, for programs that misread them. spelling: how the
    file that the adapter was read from spells its keys (`Adapter.metadata["spelling"]`), None for the format's own way.
    """

    base: Any = None
    blocks: Literal["q8_0"] | None = None
    keep_alpha: bool = False
    spelling: Mapping[str, Any] | None = None


class Format(ABC):
    """A file format of adapters.

    An adapter's format is detected in two steps: each format is asked whether it `owns` the path, and then, of a file
    that none of them owns, whether it `fits` the names of the tensors. `formats.load` refuses `alpha` and `packed`, and
    `formats.save` blocks of 8 bits, unless the format takes them; the other options are ignored by a format that has
    no use for them.
    """

    name: str  # also the name of its file in this folder
    is_folder: bool = False  # written as a folder with a config and the tensors, not as one file
    takes_alpha: bool = False  # its files may lack alpha, and the caller gives it
    takes_packed: bool = False  # its files do not say which parts of a packed projection are adapted
    takes_blocks: bool = False  # it has tensors in blocks of 8 bits
    tells_model: bool = False  # it is for diffusion models, told by names and widths or `model_type`
    files: tuple[str, ...] = ()  # names of the file with the tensors, in a folder of this format

    def owns(self, path: Path) -> bool:
        """Whether a folder, or a file by its first bytes or what lies beside it, is of this format."""
        return False

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        """Whether a file whose tensors have these names is of this format.

        Raises AdapterError for a part of this format that cannot be read by itself.
        """
        return False

    def file_in(self, path: Path) -> Path:
        """Return the file with the tensors: `path` itself, or in the folder `path`."""
        return path / DIFFUSERS_FILE if path.is_dir() else path

    @abstractmethod
    def read(self, path: Path, options: ReadOptions) -> Adapter:
        """Read an adapter. Raises AdapterError, naming the file and the key at fault."""

    @abstractmethod
    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        """Say what the format cannot hold of this adapter, one line each. `path`: where it would be written."""

    @abstractmethod
    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        """Write an adapter and return the path. Raises AdapterError, with nothing written, if the format cannot hold
        all of it.
        """

    def note(self, adapter: Adapter) -> str | None:
        """Say what the format's own program would not load of this adapter; None if it loads everything."""
        return None

    def stale(self, path: Path) -> list[str]:
        """Return the names of an older adapter's files, in the folder or beside the file `path`, which a reader would
        take for parts of the new one.
        """
        return []

    def holds(self, spelling: Mapping[str, Any]) -> bool:
        """Whether `write` can spell the keys in this way."""
        return False

    def tensors_in(self, path: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
        """Return the file with the tensors, its tensors and its header. Raises AdapterError if it is not there."""
        file = self.file_in(path)
        if not file.exists():
            lies = renamed(path, file.stem, (".safetensors", ".npz"))
            raise AdapterError(
                f"{path}: {file.name} cannot be read: it is not there"
                + (lies or f"\n  put that file beside {ADAPTER_CONFIG}")
            )
        return file, *read_unwrapped(file)
