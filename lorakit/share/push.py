"""`push`: an adapter to a repository of the Hugging Face hub, in one commit.

    pushed = push("runs/first", "OWNER/NAME", private=True)
    pushed.url, pushed.files

What is uploaded is the adapter's own: of PEFT's folder `adapter_config.json`, `adapter_model.safetensors`, `lorakit.json` and the card; of
MLX's the config and the tensors; of the other formats the one file. An adapter that does not load, or holds NaN, stays here. Paths of this
machine in a PEFT or MLX folder's texts (a base or data as a local folder) are cut to their last name in what is uploaded, and it is said;
so is where others are left.
The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LorakitError
from ..formats import FOLDERS, find, format_of
from ..formats.hub import SECONDS, api, endpoint
from ..io.hub_errors import LOGIN, TOKENS, reason
from . import card_of
from .page import with_repository
from .upload import check, files_of, inside, mended
from .words import is_hub_name

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was done, or would be. `files`: name in the repository -> bytes; `mended`: where local paths or the base's name were changed;
    `left`: where local paths are uploaded as they are; `card`: "written", "as it is here", "as it is there" or "none"; `not_on_card`: the
    options that it does not follow.
    """

    repository: str
    url: str
    revision: str
    files: dict[str, int]
    card: str
    mended: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    not_on_card: list[str] = field(default_factory=list)
    created: bool = False
    changed: bool = True
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def push(
    source: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    card: bool = True,
    dry_run: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    alpha: float | None = None,
    base: Path | None = None,
    tell: Callable[[Pushed], None] | None = None,
) -> Pushed:
    """Upload an adapter (a run's folder, an adapter's folder or file) to OWNER/NAME, which is made if it is not there.

    revision: a branch, made if it is not there. card: with a README.md, the one beside the adapter or a new one; a card that the
    repository has already is left alone if there is none here. dry_run: nothing is asked of the hub. base_model: the base's hub id, where
    the adapter names a local folder. `tell(pushed)` hears what is going to be uploaded. LorakitError where the hub refuses.
    """
    if not is_hub_name(repository):
        raise ConfigError(f"'{repository}' is no name of a repository\n  expected OWNER/NAME, of letters, digits, '-', '_' and '.'")
    if base_model is not None and not is_hub_name(base_model):
        raise ConfigError(f"base model '{base_model}': expected a hub id, OWNER/NAME")
    path = find(source)
    form = format_of(path)
    files = files_of(path, form)
    with ExitStack() as stack:
        check(files, path, form, alpha, base)
        ours = mended(files, base_model, stack)
        files = ours.files
        if ours.changed:
            check(files, path, form, alpha, base)
        there = {} if dry_run else _repository(repository, revision, private)
        kind, page = _page(path, form, repository, card, there, base_model, license, alpha, base)
        sizes = {name: file.stat().st_size for name, file in files.items()} | ({CARD: len(page)} if page is not None else {})
        told = Pushed(
            repository,
            f"{endpoint()}/{repository}",
            revision or "main",
            dict(sorted(sizes.items())),
            kind,
            ours.changed,
            ours.left,
            _not_on(kind, page, base_model, license),
        )
        if tell is not None:
            tell(told)
        return told if dry_run else _upload(told, files, page, private, message or "Upload an adapter with lorakit", there)


def _repository(repository: str, revision: str | None, private: bool) -> dict[str, Any]:
    """What the hub has by that name: {} if nothing, else its commit and the names of its files. LorakitError if it cannot be written."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if get_token() is None:
        raise LorakitError(f"{repository}: there is no token, and the hub takes uploads only with one\n  {LOGIN}; {TOKENS} (of kind write)")
    try:
        info = api().model_info(repository, timeout=SECONDS)
        if private and not info.private:
            raise LorakitError(
                f"{repository} exists and is public: --private is for a new repository, and hides nothing that is there\n"
                f"  change it at {endpoint()}/{repository}/settings, name another repository, or leave --private out"
            )
        if revision not in (None, "main"):
            info = api().model_info(repository, revision=revision, timeout=SECONDS)
    except RevisionNotFoundError:
        pass  # it is made; its files are those of main
    except LorakitError:
        raise
    except Exception as error:
        gated = isinstance(error, GatedRepoError)  # of the class of those that are not found, and it is there
        if isinstance(error, RepositoryNotFoundError) and not gated:
            return {}
        raise LorakitError(f"nothing was uploaded to {repository}: {reason(error, repository, revision, writing=True)}") from error
    return {"commit": info.sha, "files": [f.rfilename for f in info.siblings or []]}


def _page(
    path: Path, form: str, repository: str, wanted: bool, there: Mapping[str, Any], base_model: str | None, license: str | None,
    alpha: float | None, base: Path | None,
) -> tuple[str, bytes | None]:  # fmt: skip
    """The card to upload, and how it came about."""
    if not wanted:
        return "none", None
    home = path if path.is_dir() else path.parent
    beside = home / CARD if form in FOLDERS or path.is_dir() else home / f"{path.stem}.{CARD}"
    if beside.is_file():
        inside(beside, "leave the card out with --no-card")
        if license is not None:
            raise ConfigError(f"{beside} is the card, and a licence belongs into it\n  lorakit card {path} --license {license}, or edit it")
        text = beside.read_text(encoding="utf8", errors="replace")
        return "as it is here", with_repository(text, repository).encode()
    if CARD in there.get("files", ()):
        return "as it is there", None
    written = card_of(path, repository=repository, base_model=base_model, license=license, alpha=alpha, base=base)
    return "written", written.text.encode()


def _not_on(kind: str, page: bytes | None, base_model: str | None, license: str | None) -> list[str]:
    """The options that a card would follow, and this one does not: it was there before, or there is none."""
    if kind == "written":
        return []
    said = page.decode() if page is not None else ""
    wanted = {"--license": license, "--base-model": base_model if kind != "none" else None}  # the latter is the config's, too
    return [f"{k} {v}" for k, v in wanted.items() if v is not None and not re.search(rf"(?<![\w./-]){re.escape(v)}(?![\w/-])", said)]


def _upload(told: Pushed, files: Mapping[str, Path], page: bytes | None, private: bool, message: str, there: Mapping[str, Any]) -> Pushed:
    """One commit with everything."""
    from huggingface_hub import CommitOperationAdd

    hub, branch = api(), told.revision
    try:
        if not there:
            hub.create_repo(told.repository, private=private or None, exist_ok=True, repo_type="model")
        if branch != "main":
            hub.create_branch(told.repository, branch=branch, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()]
        operations += [CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=page)] if page is not None else []
        commit = hub.create_commit(told.repository, operations, commit_message=message, revision=branch, repo_type="model")
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise LorakitError(f"the upload to {told.repository} failed: {reason(cause, told.repository, branch, writing=True)}") from error
    return replace(told, created=not there, commit=commit.oid, changed=commit.oid != there.get("commit"))
