"""/health: whether the engine answers. For whoever starts the server again when it does not."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from ..engine import Stats
from ..service import Service
from .forms import ERRORS, Health
from .replies import Json

# Seconds that a step may take while requests run. Prompts are computed in bounded chunks, so that even a large model on
# a CPU makes one within seconds.
LONGEST_STEP = 60.0


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["server"])
    failed: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "The engine does not answer"}}

    @routes.get("/health", responses={200: {"model": Health}, **ERRORS, **failed}, response_model=None)
    async def health() -> Response:
        """Answer 200 if the engine is idle, or computed something within the last minute; else 503."""
        stats = service.engine.stats()
        problem = _problem(stats)
        state: Health = {
            "status": "failed" if problem else "ok",
            "running": stats.running,
            "waiting": stats.waiting,
            "adapters": stats.on_device,
            "problem": problem,
        }
        return Json(state, 503 if problem else 200)

    return routes


def _problem(stats: Stats) -> str | None:
    if not stats.alive:
        return "the engine has ended; its log says why"
    since = 0.0 if stats.last_step is None else time.monotonic() - stats.last_step
    if stats.running and since > LONGEST_STEP:
        return f"requests run, but nothing was computed for {since:.0f} seconds"
    return None
