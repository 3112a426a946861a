"""Loading and unloading adapters while the server runs, in vLLM's forms. Only for callers who may manage it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from ...errors import AdapterError, ConfigError, StateError
from ..errors import UnknownAdapter, Unreachable
from ..names import check_name
from ..service import Service
from .errors import ApiError
from .forms import ERRORS
from .requests import LoadRequest, UnloadRequest

OK = {"description": "What was done", "content": {"text/plain": {"schema": {"type": "string"}}}}


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["adapters"])
    registry = service.registry

    @routes.post("/v1/load_lora_adapter", responses={200: OK, **ERRORS}, response_model=None)
    async def load_lora_adapter(request: LoadRequest) -> Response:
        """Load an adapter, and check that it fits the base. A name that is taken is an error unless load_inplace."""
        try:
            check_name(request.lora_name, registry.base_names)
        except ConfigError as error:
            raise ApiError(str(error), "lora_name") from error
        name, in_place = request.lora_name, bool(request.load_inplace)
        try:
            await registry.load(name, request.lora_path, pin=request.pin, in_place=in_place)
        except StateError as error:
            raise ApiError(str(error), "lora_name", "name_taken") from error
        except Unreachable:
            raise
        except AdapterError as error:
            raise ApiError(str(error), "lora_path", "adapter_refused") from error
        except ConfigError as error:  # a place that is not allowed
            raise ApiError(str(error), "lora_path") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.", headers=_note(request))

    @routes.post("/v1/unload_lora_adapter", responses={200: OK, **ERRORS}, response_model=None)
    async def unload_lora_adapter(request: UnloadRequest) -> Response:
        """Forget an adapter once its requests are done; new ones are refused at once."""
        if request.lora_name in registry.base_names:
            raise ApiError(f"'{request.lora_name}' is the base, which stays\n  give an adapter's name", "lora_name")
        try:
            freed = await registry.unload(request.lora_name)
        except UnknownAdapter as error:
            raise ApiError(str(error), "lora_name", "model_not_found", 404) from error
        return PlainTextResponse(
            f"Success: LoRA adapter '{request.lora_name}' removed successfully ({freed:,} bytes freed).",
            headers=_note(request),
        )

    return routes


def _note(request: LoadRequest | UnloadRequest) -> dict[str, str]:
    """Name the fields of vLLM's form that mean nothing here."""
    given = [name for name in ("lora_int_id", "base_model_name") if getattr(request, name, None) is not None]
    return {"x-lorakit-warning": f"not used: {', '.join(given)}"} if given else {}
