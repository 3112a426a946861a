"""What went wrong between here and the hub, in plain words, with what to do about it.

`huggingface_hub` raises its own errors for answers of the hub, its HTTP library's for the way there, and ValueError for names. They are
told by their class and status here, and nothing else of lorakit needs to know them.
"""

from __future__ import annotations

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
TOKENS = "a token is made at https://huggingface.co/settings/tokens"


def unreachable(error: BaseException) -> bool:
    """Whether the hub was not reached, or is out of order, so that what is cached must do."""
    status = _status(error)
    return _is(error, "OfflineModeIsEnabled", "TransportError") or (status is not None and status >= 500)


def reason(error: BaseException, repository: str, revision: str | None = None, *, writing: bool = False) -> str:
    """What it was, then lines with the fix, indented."""
    from huggingface_hub import get_token

    status, known = _status(error), get_token() is not None
    if _is(error, "OfflineModeIsEnabled"):
        return "HF_HUB_OFFLINE is set\n  unset it to reach the hub"
    if _is(error, "TransportError"):
        return f"it cannot be reached ({_first(error)})\n  check the network, and HF_ENDPOINT if it is set"
    if _is(error, "GatedRepoError"):
        return f"{repository} is gated: its owner grants access\n  ask for it on the repository's page, then {LOGIN}"
    if _is(error, "RevisionNotFoundError"):
        return f"{repository} has no revision '{revision or 'main'}'\n  expected a branch, a tag or a commit of it"
    if _is(error, "EntryNotFoundError"):
        return f"a file of {repository} is gone while it was read\n  try again"
    if status == 401 and not _is(error, "RepositoryNotFoundError"):
        told = "the token was refused" if known else "there is no token"
        return f"{told}\n  {LOGIN}; {TOKENS}{' (of kind write)' if writing else ''}"
    if _is(error, "RepositoryNotFoundError") or status == 404:
        seen = "the token that is set does not see it" if known else LOGIN
        return f"there is no repository {repository}, or it is private\n  check the name; if it is private: {seen}"
    if status == 403:
        what = f"write to {repository}" if writing else f"read {repository}"
        return f"the token may not {what}: {_first(error)}\n  use one with that permission; {TOKENS}"
    if status == 409:
        return f"{repository} was changed by somebody else at the same time\n  try again"
    if status == 429:
        return "it takes no more requests for now\n  try again in some minutes"
    if status is not None and status >= 500:
        return f"it answers {status}: the trouble is on its side\n  try again later"
    return f"{type(error).__name__}: {_first(error)}"


def _is(error: BaseException, *names: str) -> bool:
    """By the names of its classes: the HTTP library behind huggingface_hub changes from version to version."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first(error: BaseException) -> str:
    """What the hub itself said, or the error's first line."""
    told = getattr(error, "server_message", None) or str(error)
    return next((line.strip() for line in told.splitlines() if line.strip()), type(error).__name__)
