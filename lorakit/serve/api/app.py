"""The HTTP face: FastAPI's app over a `Service`, in the forms of OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..service import Service


def create_app(service: Service) -> FastAPI:
    """Return the app. Hosts, keys and the size of bodies are checked around it: see `guard`."""
    from fastapi import FastAPI

    app = FastAPI(title="lorakit")
    app.state.service = service
    return app
