"""What both kinds of completion do before and around their answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from ...errors import nearest
from ..card import Leased
from ..service import Service
from .errors import ApiError
from .offered import not_used
from .requests import Sampled
from .sampling import check_extra

NAMES_IN_WARNING = 10
# What may stand in a header as it is. Names of fields come from the request, and must not end the header.
PRINTABLE = "".join(chr(code) for code in range(32, 127) if chr(code) != "%")


def check(request: Sampled, service: Service) -> None:
    """Check what does not depend on the model. Raises ApiError."""
    check_extra(request.model_extra)
    if request.n is not None and request.n > service.limits.answers:
        raise ApiError(f"n is {request.n}; this server gives up to {service.limits.answers} answers", "n")


def scale(request: Sampled) -> float | None:
    """Return the factor on the adapters that is asked for."""
    return None if request.lorakit is None else request.lorakit.scale


def deadline(service: Service) -> float:
    """Return when a request that begins now must be done, on time.monotonic()'s clock."""
    return time.monotonic() + service.limits.seconds


def fixed(kind: str, prefix: str, leased: Leased, service: Service) -> dict[str, Any]:
    """Return the keys that all chunks of an answer have, and the answer itself."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": leased.model,
        "system_fingerprint": service.fingerprint,
    }


def headers(request: Sampled, leased: Leased, notes: Sequence[str] = ()) -> dict[str, str]:
    """Return the response's headers: which version of which adapters answers, and what of the request had no effect.

    notes: what else had none.
    """
    found = {}
    if leased.cards:
        found["x-lorakit-adapter"] = "+".join(card.version for card in leased.cards)
    if warnings := [text for text in (_warning(request), *notes) if text]:
        found["x-lorakit-warning"] = "; ".join(quote(text, safe=PRINTABLE, errors="replace") for text in warnings)
    return found


def _warning(request: Sampled) -> str:
    known = type(request).model_fields
    names = not_used(request.model_extra or {})
    shown = []
    for name in names[:NAMES_IN_WARNING]:
        close = nearest(name, known) if len(name) < 40 else None
        shown.append((name[:40].strip() or "''") + (f" (did you mean {close}?)" if close else ""))
    if len(names) > NAMES_IN_WARNING:
        shown.append(f"{len(names) - NAMES_IN_WARNING} more")
    return f"not used: {', '.join(shown)}" if shown else ""
