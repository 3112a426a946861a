"""The HTTP face: FastAPI's app over a `Service`, in the forms of OpenAI's API. A file for each of its paths.

chat, completions     answers                         both: asked -> sampling -> answers -> events
models, adapters      what can be asked for           load and unload, as vLLM's
tokenize, health      what a prompt becomes; whether the engine answers
errors, offered       OpenAI's error objects; what is not served, by name
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from ...version import VERSION
from ..service import Service
from . import adapters, chat, completions, errors, health, models, tokenize

ABOUT = """Many LoRA adapters on one base, in OpenAI's API. `model` names the adapter, the base, or a mix such as
`a:0.7+b:0.3`; any client of OpenAI's API works with the base URL `http://HOST:PORT/v1`."""


class App(FastAPI):
    """FastAPI, whose page of the API leaves out the answer 422: what is not valid is 400 here."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI page."""
        if self.openapi_schema is None:
            page = super().openapi()
            for path in page["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                page["components"]["schemas"].pop(name, None)
        return super().openapi()


def create_app(service: Service) -> FastAPI:
    """Return the app. Hosts, keys and the size of bodies are checked around it: see `guard`."""
    # No pages of documentation: FastAPI's load their scripts from another host. /openapi.json describes everything.
    app = App(title="lorakit", version=VERSION, description=ABOUT, docs_url=None, redoc_url=None)
    for part in (chat, completions, models, adapters, tokenize, health):
        app.include_router(part.router(service))
    errors.install(app)
    return app
