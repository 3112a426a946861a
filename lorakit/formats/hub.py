"""Adapters on the Hugging Face hub: parse a name into repository, revision and file, and download the adapter's files.

    OWNER/NAME                          PEFT's or MLX's folder at the top, else the one file that can be an adapter
    OWNER/NAME@REVISION                 of a branch, tag or commit (a slash in a branch's name is written %2F)
    OWNER/NAME/path/file.safetensors    that file (kohya's and GGUF adapters are single files)
    hf://OWNER/NAME/path                a folder inside, or any of these if a local folder has the same name

The repository's files are listed first, and only the adapter's are downloaded, not a model's beside it. Offline, or
with HF_HUB_OFFLINE, earlier downloads are taken from huggingface_hub's cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from ..bases.hub_reach import out_of_reach
from ..errors import AdapterError, did_you_mean, listing
from ..io.hub_errors import reason, unreachable
from ..version import VERSION
from . import diffusers, mlx, peft
from .peft_files import beside
from .peft_shards import SHARD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SECONDS = 10.0  # timeout of the first request
# A larger single file is downloaded only if the caller named it: it is probably a model. (Rank 256 on every layer of
# Flux is 2 GB.)
MOST_BYTES = 3 << 30

_NAME = re.compile(
    r"(?P<scheme>hf://)?(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>refs/pr/\d+|[^/\s]+))?(?:/(?P<inside>[^\s].*?)/?)?",
    re.ASCII,
)
_CONFIG, _OURS, _DIFFUSERS = peft.CONFIG, peft.OURS, diffusers.FILE
_WEIGHTS = (peft.WEIGHTS, mlx.WEIGHTS, mlx.NPZ, peft.PICKLE)  # beside a config (PEFT's and MLX's have one name)
_SUFFIXES = (".safetensors", ".npz", ".gguf")
_PICKLES = (".pt", ".pth", ".bin")
# What models, trainers and optimizers call their files.
_OTHERS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|consolidated(\.\d+)?|optimizer|scheduler|scaler|training_args)"
    r"(\.(fp16|bf16|fp32|ema|non_ema))?\.\w+|rng_state\w*\.\w+|.*-\d{5}-of-\d{5}\.\w+"
)


class HubName(NamedTuple):
    repository: str
    revision: str | None = None
    inside: str | None = None  # a file or folder of it


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or huggingface_hub's default."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), library_name="lorakit", library_version=VERSION)


def hub_name(text: str) -> HubName | None:
    """Parse a hub name; None if the text looks like a local path."""
    found = _NAME.fullmatch(text)
    if found is None:
        return None
    inside, suffix = found["inside"], PurePosixPath(text).suffix
    if not found["scheme"] and not found["revision"]:
        file = suffix in (*_SUFFIXES, *_PICKLES, ".json")
        owner = text.split("/")[0]
        if file if inside is None else not file or Path(owner).is_dir():
            return None
    return HubName(found["repository"], found["revision"] and unquote(found["revision"]), inside)


def fetch(source: str, revision: str | None = None) -> Path:
    """Download a hub id's adapter (or take it from the cache) and return its local folder or file. `revision`: a
    branch, tag or commit. AdapterError if it does not exist or cannot be downloaded.
    """
    here = Path(source).expanduser().parent
    alike = did_you_mean(Path(source).name, [p.name for p in here.iterdir()]) if here.is_dir() else ""
    name = hub_name(source)
    if name is None:
        raise AdapterError(f"no adapter at '{source}': there is no such file or folder{alike}")
    if revision is not None and name.revision is not None:
        raise AdapterError(f"'{source}' says a revision, and revision '{revision}' was given too\n  leave one out")
    name = name._replace(revision=revision or name.revision)
    from huggingface_hub import snapshot_download

    try:
        why = out_of_reach()
        if why is not None and _snapshot(name) is None:
            raise AdapterError(
                f"no adapter at '{source}': no such file or folder here{alike}\n"
                f"  and the hub did not give it: it cannot be reached ({why})\n"
                "  check the network, and HF_ENDPOINT if it is set"
            )
        found = None if why is not None else _files(name)
        if found is None:
            return _cached(name)
        files, commit = found
        chosen, opened = choose(files, name)
        here_already = _snapshot(name)
        if (
            here_already is not None
            and here_already.name == commit
            and all((here_already / file).is_file() for file in chosen)
        ):
            return here_already / opened
        patterns = [re.sub(r"([*?\[])", r"[\1]", file) for file in chosen]  # they are globs
        folder = snapshot_download(
            name.repository, revision=name.revision, allow_patterns=patterns, endpoint=endpoint()
        )
        return Path(folder) / opened
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(
            f"no adapter at '{source}': no such file or folder here{alike}\n"
            f"  and the hub did not give it: {reason(error, name.repository, name.revision)}"
        ) from error


def _files(name: HubName) -> tuple[dict[str, int | None], str | None] | None:
    """({file: bytes}, commit) of the repository; None if the hub cannot be reached and the cache has files of it."""
    try:
        info = api().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=SECONDS)
    except Exception as error:
        if unreachable(error) and _snapshot(name) is not None:
            return None
        raise
    return {
        file.rfilename: file.size for file in info.siblings or [] if ".." not in PurePosixPath(file.rfilename).parts
    }, info.sha


def _snapshot(name: HubName) -> Path | None:
    """The cache's folder for this revision; None if nothing of it was downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # no pattern: no file of it is asked for
        return Path(
            snapshot_download(name.repository, revision=name.revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError:
        return None


def _cached(name: HubName) -> Path:
    folder = _snapshot(name)
    assert folder is not None  # `_files` has looked
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    try:
        return folder / choose(files, name)[1]
    except AdapterError as error:
        raise AdapterError(
            f"{error}\n  (the hub cannot be reached; these are the files that were fetched before)"
        ) from error


def choose(files: Mapping[str, int | None], name: HubName) -> tuple[list[str], str]:
    """(files to download, the file or folder to open). `files`: the repository's, with their bytes. AdapterError if
    none can be the adapter, or several can.
    """
    folder = ""
    if name.inside is not None:
        if name.inside in files:
            above, _, last = name.inside.rpartition("/")
            folder = f"{above}/" if above else ""
            if last not in (_CONFIG, *_WEIGHTS) or f"{folder}{_CONFIG}" not in files:
                return [name.inside], name.inside
        elif any(file.startswith(f"{name.inside}/") for file in files):
            folder = f"{name.inside}/"
        else:
            known = f"\n  it holds: {listing(sorted(files), 8)}"
            raise AdapterError(
                f"{name.repository} has no file or folder '{name.inside}'{did_you_mean(name.inside, files)}{known}"
            )
    at = {
        file.removeprefix(folder): size
        for file, size in files.items()
        if file.startswith(folder) and "/" not in file[len(folder) :]
    }
    if _CONFIG in at:
        weights = next((w for w in _WEIGHTS if w in at), None)
        shards = [file for file in at if SHARD.fullmatch(file)]
        names = {file.removeprefix(folder) for file in files if file.startswith(folder)}
        others = [folder + file for file in beside(names)]
        if weights is None and shards:
            return [*(folder + file for file in (_CONFIG, *shards, _OURS) if file in at), *others], folder
        if weights is None:
            raise AdapterError(
                f"{name.repository}/{folder} has an {_CONFIG} and no weights: none of {', '.join(_WEIGHTS)}"
            )
        return [*(folder + file for file in (_CONFIG, weights, _OURS) if file in at), *others], folder
    file = _DIFFUSERS if _DIFFUSERS in at else _single(at, files, f"{name.repository}/{folder}".rstrip("/"))
    return [folder + file], folder + file


def _single(at: Mapping[str, int | None], all_files: Collection[str], where: str) -> str:
    """The only file of a folder that can be an adapter. AdapterError if there are several or none."""
    for suffixes in (_SUFFIXES, _PICKLES):
        found = [f for f in at if PurePosixPath(f).suffix in suffixes and not _OTHERS.fullmatch(f)]
        if len(found) > 1:
            names = "".join(f"\n    {where}/{file}" for file in sorted(found)[:20])
            more = f"\n    and {len(found) - 20} more" if len(found) > 20 else ""
            raise AdapterError(f"{where} holds several files that can be adapters\n  name one of them:{names}{more}")
        if found:
            size = at[found[0]] or 0
            if size > MOST_BYTES:
                raise AdapterError(
                    f"{where} holds {found[0]}, which is rather a model than an adapter ({size:,} bytes), and was not "
                    "fetched\n"
                    f"  if it is one, name the file: {where}/{found[0]}"
                )
            return found[0]
    model = " (it holds a model: config.json)" if "config.json" in at or "model_index.json" in at else ""
    deeper = sorted({str(PurePosixPath(f).parent) for f in all_files if PurePosixPath(f).name in (_CONFIG, _DIFFUSERS)})
    also = f"\n  there are adapters in folders of it, to be named so: hf://{where}/{deeper[0]}" if deeper else ""
    raise AdapterError(f"{where} holds no adapter{model}: its files are {listing(sorted(at), 8) or 'none'}{also}")
