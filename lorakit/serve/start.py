"""Put a server together: engine, registry, renderer, API and guards, as the settings ask.

    running = await start(settings, notice=print)       # ready to be served by `server.serve`

An engine is a folder here, named as in --engine, whose `build.build(settings)` loads what it needs and returns `Built`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import LorakitError, listing
from .guard.guarded import guarded
from .logs import access_line, configure, report
from .metrics import Metrics, add_metrics
from .observe import observed
from .server import Running
from .settings import ServeSettings
from .threads import in_thread

if TYPE_CHECKING:
    from .engine import Engine, Facts
    from .registry import Registry
    from .renderer import Renderer
    from .service import Service

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "httpx2")  # of the extra `serve`


@dataclass(frozen=True)
class Built:
    """An engine that is not started yet, and what the renderer needs. ends: tokens that end the model's generation."""

    engine: Engine
    tokenizer: Any
    ends: Sequence[int]


def check_packages() -> None:
    """Raise LorakitError if the extra `serve` is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise LorakitError(
            f"the server needs packages that are not installed: {listing(missing)}\n  pip install 'lorakit[serve]'"
        )


async def start(settings: ServeSettings, notice: Callable[[Service], None]) -> Running:
    """Load the model and the adapters of the command line. notice: gets the service once it is complete.

    Raises LorakitError for what cannot be loaded; then nothing is left running.
    """
    from .renderer import Renderer
    from .service import Service

    await in_thread(lambda: _check_files(settings), "lorakit-check")
    build: Callable[[ServeSettings], Built] = import_module(f".{settings.engine}.build", __package__).build
    built = await in_thread(lambda: build(settings), "lorakit-load")
    closing: list[Callable[[], Awaitable[None]]] = []

    async def stop(drain: float) -> None:
        """Let running answers end within `drain` seconds; then nothing holds what the other parts have."""
        await built.engine.stop(drain)
        for close in reversed(closing):
            await close()

    try:
        facts = replace(await built.engine.start(), base=settings.name)  # an engine may call it by its path
        renderer = Renderer(built.tokenizer, built.ends, template=settings.chat_template)
        closing.append(renderer.close)
        registry = _registry(settings, built.engine, facts, renderer)
        closing.append(registry.close)
        await registry.start()
        service = Service(built.engine, facts, registry, renderer, settings.guard.limits)
        app = _app(settings, service)
    except BaseException:
        await stop(0)
        raise
    notice(service)
    return Running(app, stop)


def _check_files(settings: ServeSettings) -> None:
    """Raise for adapters of the command line that are not there, and for a state file that cannot be used.

    Before the model is loaded, which takes long.
    """
    from .guard.hub import Hub
    from .guard.roots import Roots
    from .locations import Locations
    from .names import check_name
    from .state_file import StateFile

    if settings.state is not None:
        state = StateFile(settings.state, settings.name)
        state.open()
        state.close()
    locations = Locations(Roots(settings.roots), Hub(settings.hub), settings.allow_pickle)
    for name, path in settings.adapters.items():
        check_name(name, (settings.name,))
        _, locate = locations.on_command_line(path, name)
        locate()


def _registry(settings: ServeSettings, engine: Engine, facts: Facts, renderer: Renderer) -> Registry:
    from ..bases.load import model_path
    from .guard.hub import Hub
    from .guard.roots import Roots
    from .registry import Registry

    registry = Registry(
        engine,
        facts,
        base_names=(settings.name,),
        roots=Roots(settings.roots),
        hub=Hub(settings.hub),
        state=settings.state,
        allow_pickle=settings.allow_pickle,
        base=model_path(settings.base),
        check=renderer.check,
    )
    for name, path in settings.adapters.items():
        registry.add(name, path)
    return registry


def _app(settings: ServeSettings, service: Service) -> Any:
    from .api.app import create_app

    configure(settings.access_log)
    app = create_app(service)
    metrics = Metrics(service.engine.stats)
    add_metrics(app, metrics)
    return observed(guarded(app, settings.guard, report), (metrics.observe, access_line))
