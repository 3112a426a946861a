"""A module that adapters hold whole (a classifier's head, a norm, biases), while each row has its own adapter.

    y[n] = module(x[n]) with the parameters of row n's adapter, the base's where it has none

The module is called once for each version of its parameters that the batch names, on the rows that use it. For that its
instance gets a `forward` while `lorakit.route` is active, as accelerate's hooks do, so that fused code, which asks for
such a forward, leaves the module to itself.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import StateError
from ..layer import LoraLayer
from ..saved import SavedParameters, put, saved_of
from .routes import Routing

Versions = tuple[str, ...]  # the adapters whose parameters a row uses; () for the base's


@contextmanager
def routed(modules: Sequence[tuple[str, nn.Module]], routing: Routing, adapters: Sequence[Versions]) -> Iterator[None]:
    """Let these modules use each row's own parameters inside the context.

    `adapters`: of each of the routing's choices the adapters that hold parameters whole. The base's must be in use.
    """
    entered: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in modules:
            child = saved_of(module)
            assert child is not None
            rows = [tuple(a for a in own if child.get(a)) for own in adapters]
            if any(rows):
                before = module.__dict__.get("forward")
                module.__dict__["forward"] = _Rows(name, module, child, routing, rows, before)
                entered.append((module, before))
        yield
    finally:
        for module, before in entered:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


class _Rows:
    """The forward of one module. `before`: what its instance had, accelerate's, or None for its class's own."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        child: SavedParameters,
        routing: Routing,
        rows: Sequence[Versions],
        before: Any,
    ):
        self.name, self.module, self.child, self.routing, self.rows = name, module, child, routing, rows
        self.own = before or types.MethodType(type(module).forward, module)
        self._index: dict[tuple[int, torch.device], dict[Versions, Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        axis, times = self._axis(given)
        parts, places = [], []
        for versions, index in self._groups(times, given[0].device).items():

            def pick(value: Any, index: Tensor = index) -> Any:
                if not isinstance(value, Tensor) or value.dim() <= axis:
                    return value
                if value.shape[axis] == 1 and len(self.rows) * times > 1:  # the same for all rows, as positions are
                    return value.expand(*value.shape[:axis], len(index), *value.shape[axis + 1 :])
                return value.index_select(axis, index)

            parts.append(self._call(versions, [pick(v) for v in args], {k: pick(v) for k, v in kwargs.items()}))
            places.append(index)
        back = torch.cat(places).argsort()
        y = torch.cat(parts, axis).index_select(axis, back)
        module = self.module
        if isinstance(module, LoraLayer) and module.lora_route is not None:
            # The generic way of adding updates, as the parts do not share the fast one's base product.
            return module.lora_route.add_updates(module, y, given[0], bias=self._bias(times))
        return y

    def _bias(self, times: int) -> Tensor | None:
        """Each row's bias, [rows, out]; None if adapters hold none of their own."""
        own, versions = self.module._parameters.get("bias"), {v for versions in self.rows for v in versions}
        if own is None or not any("bias" in self.child.get(v) for v in versions):
            return None
        biases: dict[Versions, Tensor] = {
            row: next((b for v in row if (b := self.child.get(v).get("bias")) is not None), own)
            for row in set(self.rows)
        }
        return torch.stack([biases[row] for row in self.rows for _ in range(times)])

    def _call(self, versions: Versions, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        """Run the module without updates, with these versions of its parameters."""
        module = self.module
        route = module.__dict__.pop("lora_route", None)
        active = module.__dict__.get("lora_active")
        if active is not None:
            module.__dict__["lora_active"] = ()
        put(module, self.child, versions)
        try:
            y = self.own(*args, **kwargs)
        finally:
            put(module, self.child, ())
            if active is not None:
                module.__dict__["lora_active"] = active
            if route is not None:
                module.__dict__["lora_route"] = route
        if not isinstance(y, Tensor):
            raise StateError(
                f"'{self.name}' returns a {type(y).__name__}, so its rows cannot use the saved weights of different "
                "adapters\n"
                "  run the rows of each adapter in a batch of their own, after lorakit.activate(model, name)"
            )
        return y

    def _axis(self, given: Sequence[Tensor]) -> tuple[int, int]:
        """The axis of the choices in what the module was given, and how many of its positions each stands for."""
        choices = len(self.rows)
        if given and self.routing.per_token:
            shape = given[0].shape
            if choices in shape[:2]:
                return list(shape[:2]).index(choices), 1
        elif given:
            sizes = {value.shape[0] for value in given} - {1}
            size = sizes.pop() if len(sizes) == 1 else 1 if not sizes else 0
            if size in (choices, choices * self.routing.repeat):
                return 0, size // choices
            if size == 1:  # one row for all of the batch's
                return 0, 1
        what = "token" if self.routing.per_token else "row"
        shapes = ", ".join(str(list(value.shape)) for value in given) or "no tensor"
        raise StateError(
            f"'{self.name}' was given {shapes} inside lorakit.route; expected one {what} for each of the {choices} "
            "choices, as adapters of the batch replace its weights\n"
            "  run the rows of each adapter in a batch of their own, after lorakit.activate(model, name)"
        )

    def _groups(self, times: int, device: torch.device) -> dict[Versions, Tensor]:
        """The rows of each version, as an index."""
        if (times, device) not in self._index:
            places: dict[Versions, list[int]] = {}
            for at, versions in enumerate(v for v in self.rows for _ in range(times)):
                places.setdefault(versions, []).append(at)
            self._index[times, device] = {v: torch.tensor(rows, device=device) for v, rows in places.items()}
        return self._index[times, device]
