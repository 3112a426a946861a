"""/v1/models: the base and every adapter that can be asked for, from the registry."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ..card import Card
from ..service import Service
from .forms import ERRORS, AboutModel, ModelList, ModelObject
from .replies import Json

OWNER = "lorakit"


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", responses={200: {"model": ModelList}, **ERRORS}, response_model=None)
    async def list_models() -> Response:
        """List the base and the adapters. One that could not be loaded is not listed, but can be looked up."""
        bases = [base(service, name) for name in service.registry.base_names]
        cards = [adapter(service, card) for card in service.registry.cards() if card.status != "failed"]
        return Json({"object": "list", "data": [*bases, *cards]})

    @routes.get("/v1/models/{model:path}", responses={200: {"model": ModelObject}, **ERRORS}, response_model=None)
    async def retrieve_model(model: str) -> Response:
        """Return one of them."""
        if model in service.registry.base_names:
            return Json(base(service, model))
        return Json(adapter(service, service.registry.get(model)))

    return routes


def base(service: Service, name: str) -> ModelObject:
    """Return the base under one of its names."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": OWNER,
        "root": service.facts.base,
        "parent": None,
        "max_model_len": service.facts.context,
    }


def adapter(service: Service, card: Card) -> ModelObject:
    """Return an adapter."""
    about: AboutModel = {
        "status": card.status,
        "version": None if card.key is None else card.key[:12],
        "rank": None if card.key is None else card.rank,
        "bytes": None if card.key is None else card.size,
        "pinned": card.pinned,
        "running": card.running,
        "problem": card.problem,
    }
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": OWNER,
        "root": card.place,
        "parent": service.registry.base_names[0],
        "max_model_len": service.facts.context,
        "lorakit": about,
    }
