"""Say what went wrong with a request to the hub, and how to fix it.

`huggingface_hub` raises its own errors for the hub's answers, its HTTP library's for the connection, and ValueError for
malformed names. They are told apart by class and status code here, so no other file has to know them.
"""

from __future__ import annotations

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
TOKENS = "create a token at https://huggingface.co/settings/tokens"


def unreachable(error: BaseException) -> bool:
    """Whether the hub was not reached or failed (status 500 and up), so that the cache has to do."""
    status = _status(error)
    return _is(error, "OfflineModeIsEnabled", "TransportError") or (status is not None and status >= 500)


def reason(error: BaseException, repository: str, revision: str | None = None, *, writing: bool = False) -> str:
    """Return the reason in one line, then the fix on an indented one. writing: the request was an upload."""
    from huggingface_hub import get_token

    status, has_token = _status(error), get_token() is not None
    if _is(error, "OfflineModeIsEnabled"):
        return "HF_HUB_OFFLINE is set\n  unset it to reach the hub"
    if _is(error, "TransportError"):
        return f"it cannot be reached ({_first(error)})\n  check the network, and HF_ENDPOINT if it is set"
    if _is(error, "GatedRepoError"):
        return (
            f"{repository} is gated: its owner grants access\n  ask for access on the repository's page, then {LOGIN}"
        )
    if _is(error, "RevisionNotFoundError"):
        return f"{repository} has no revision '{revision or 'main'}'\n  expected a branch, a tag or a commit of it"
    if _is(error, "EntryNotFoundError"):
        return f"a file of {repository} was deleted while it was read\n  try again"
    if status == 401 and not _is(error, "RepositoryNotFoundError"):
        why = "the token was refused" if has_token else "there is no token"
        return f"{why}\n  {LOGIN}; {TOKENS}{' (of kind write)' if writing else ''}"
    if _is(error, "RepositoryNotFoundError") or status == 404:
        access = "your token has no access to it" if has_token else LOGIN
        return f"there is no repository {repository}, or it is private\n  check the name; if it is private: {access}"
    if status == 403:
        what = f"write to {repository}" if writing else f"read {repository}"
        return f"the token may not {what}: {_first(error)}\n  use a token with that permission; {TOKENS}"
    if status == 409:
        return f"{repository} was changed by someone else at the same time\n  try again"
    if status == 429:
        return "it accepts no more requests for now (status 429)\n  try again in a few minutes"
    if status is not None and status >= 500:
        return f"it answers {status}, an error on the hub's side\n  try again later"
    return f"{type(error).__name__}: {_first(error)}"


def _is(error: BaseException, *names: str) -> bool:
    """Compare class names, as the HTTP library behind huggingface_hub differs between versions."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first(error: BaseException) -> str:
    """Return the first line of the hub's own message, or else of the error."""
    message = getattr(error, "server_message", None) or str(error)
    return next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
