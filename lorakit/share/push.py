"""Upload an adapter to a repository on the Hugging Face hub, in one commit.

    pushed = push("runs/first", "OWNER/NAME", private=True)
    pushed.url, pushed.files

Only the adapter's own files are uploaded: from PEFT's folder `adapter_config.json`, `adapter_model.safetensors`,
`lorakit.json`, what this names beside them and the card; from MLX's the config and the tensors; in other formats the
single file. An adapter that does not load, or has NaN, is not uploaded. Local paths in a PEFT or MLX folder's metadata
(a base or dataset in a local folder) are cut to their last component in the upload; the result lists these, and the
paths that are left. The token is huggingface_hub's: HF_TOKEN, or the one stored by `hf auth login`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LorakitError
from ..formats import FOLDERS, find, format_of
from ..formats.hub import SECONDS, api, endpoint
from ..io.hub_errors import LOGIN, TOKENS, reason
from .card import card_of, with_repository
from .paths import is_hub_name
from .upload import check, files_of, inside, without_local_paths

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be in a dry run.

    files: name in the repository -> bytes. mended: where local paths or the base's name were changed. left: where local
    paths are uploaded unchanged. card: "written", "as it is here" (the local one is uploaded), "as it is there" (the
    repository's is kept) or "none". not_on_card: the options that have no effect on the card.
    """

    repository: str
    url: str
    revision: str
    files: dict[str, int]
    card: str
    mended: list[str]
    left: list[str]
    not_on_card: list[str]
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
    """Upload an adapter (a run's folder, an adapter's folder or file) to the repository OWNER/NAME, created if missing.

    revision: a branch, created if missing. message: the commit's. card: upload a README.md, the one beside the adapter
    or a new one; if there is none here and the repository has one, that is kept. dry_run: send no request to the hub.
    base_model: the base's hub id, if the adapter names a local folder. alpha, base: for files that cannot be read
    without them. tell: called before the upload with what it will be. Raises ConfigError for a malformed name,
    AdapterError for an adapter that is not uploaded, LorakitError if the hub refuses.
    """
    if not is_hub_name(repository):
        raise ConfigError(
            f"'{repository}' is not a repository's name\n  expected OWNER/NAME, of letters, digits, '-', '_' and '.'"
        )
    if base_model is not None and not is_hub_name(base_model):
        raise ConfigError(f"base model '{base_model}': expected a hub id, OWNER/NAME")
    path = find(source)
    form = format_of(path)
    files = files_of(path, form)
    with ExitStack() as stack:
        check(files, path, form, alpha, base)
        files, mended, left = without_local_paths(files, base_model, stack)
        if mended:
            check(files, path, form, alpha, base)
        existing = {} if dry_run else _existing(repository, revision, private)
        kind, page = "none", None
        if card:
            options = {"base_model": base_model, "alpha": alpha, "base": base}
            kind, page = _page(path, form, repository, existing, license, options)
        sizes = {name: file.stat().st_size for name, file in files.items()} | ({CARD: len(page)} if page else {})
        planned = Pushed(
            repository,
            f"{endpoint()}/{repository}",
            revision or "main",
            dict(sorted(sizes.items())),
            kind,
            mended,
            left,
            _not_on_card(kind, page or b"", base_model, license),
        )
        if tell is not None:
            tell(planned)
        if dry_run:
            return planned
        return _upload(planned, files, page, private, message or "Upload an adapter with lorakit", existing)


def _existing(repository: str, revision: str | None, private: bool) -> dict[str, Any]:
    """Return the repository's commit and files, {} if it does not exist. Raises LorakitError if it is not writable."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if get_token() is None:
        raise LorakitError(
            f"{repository}: there is no token, and the hub needs one for uploads\n  {LOGIN}; {TOKENS} (of kind write)"
        )
    try:
        info = api().model_info(repository, timeout=SECONDS)
        with suppress(RevisionNotFoundError):  # the branch will be created from main, so `info` is right
            info = api().model_info(repository, revision=revision or "main", timeout=SECONDS)
    except Exception as error:
        # GatedRepoError is a subclass of RepositoryNotFoundError, but the repository exists
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            return {}
        why = reason(error, repository, revision, writing=True)
        raise LorakitError(f"nothing was uploaded to {repository}: {why}") from error
    if private and not info.private:
        raise LorakitError(
            f"{repository} exists and is public: --private is for new repositories and does not hide an existing one\n"
            f"  change it at {endpoint()}/{repository}/settings, name another repository, or leave --private out"
        )
    return {"commit": info.sha, "files": [f.rfilename for f in info.siblings or []]}


def _page(
    path: Path, form: str, repository: str, existing: Mapping[str, Any], license: str | None, options: Mapping[str, Any]
) -> tuple[str, bytes | None]:
    """Return (`Pushed.card`, the card's bytes to upload, if any). options: of `card_of`."""
    home = path if path.is_dir() else path.parent
    beside = home / CARD if form in FOLDERS or path.is_dir() else home / f"{path.stem}.{CARD}"
    if beside.is_file():
        inside(beside, "leave the card out with --no-card")
        if license is not None:
            raise ConfigError(
                f"{beside} is the card, and --license does not change it\n"
                f"  write it again with lorakit card {path} --license {license}, or edit it"
            )
        text = beside.read_text(encoding="utf8", errors="replace")
        return "as it is here", with_repository(text, repository).encode()
    if CARD in existing.get("files", ()):
        return "as it is there", None
    return "written", card_of(path, repository=repository, license=license, **options).text.encode()


def _not_on_card(kind: str, page: bytes, base_model: str | None, license: str | None) -> list[str]:
    """List the options that have no effect on the card, as it existed before or there is none."""
    if kind == "written":
        return []
    # without a card, --base-model still has an effect on the config
    options = {"--license": license, "--base-model": base_model if kind != "none" else None}
    given = [(name, value) for name, value in options.items() if value is not None]
    return [f"{k} {v}" for k, v in given if not re.search(rf"(?<![\w./-]){re.escape(v)}(?![\w/-])", page.decode())]


def _upload(
    planned: Pushed,
    files: Mapping[str, Path],
    page: bytes | None,
    private: bool,
    message: str,
    existing: Mapping[str, Any],
) -> Pushed:
    """Create the repository and branch if they are missing, and upload everything in one commit."""
    from huggingface_hub import CommitOperationAdd

    hub, repository, branch = api(), planned.repository, planned.revision
    contents: dict[str, str | bytes] = {name: str(file) for name, file in files.items()}
    contents |= {CARD: page} if page is not None else {}
    # not upload_folder, which uploads a large folder in several commits
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        if not existing:
            hub.create_repo(repository, private=private or None, exist_ok=True, repo_type="model")
        if branch != "main":
            hub.create_branch(repository, branch=branch, exist_ok=True)
        commit = hub.create_commit(repository, operations, commit_message=message, revision=branch, repo_type="model")
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        why = reason(cause, repository, branch, writing=True)
        raise LorakitError(f"the upload to {repository} failed: {why}") from error
    return replace(planned, created=not existing, commit=commit.oid, changed=commit.oid != existing.get("commit"))
