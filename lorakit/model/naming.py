"""Match the names in an adapter to those of a live model: a pipeline's components, and CLIP's level `text_model`.

    adapter                                           model                       the model's name
    unet.down_blocks.0...                             the pipeline                the same
    unet.down_blocks.0...                             its UNet alone              down_blocks.0...
    down_blocks.0...      (captured from a UNet)      the pipeline                unet.down_blocks.0...
    text_encoder.encoder...  (without the level)      the pipeline                text_encoder.text_model.encoder...
    text_encoder.text_model.encoder...                its text encoder alone      encoder...

An adapter that was attached under other names is captured under its own again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from ..adapter.adapter import Adapter
from ..bases.pipeline import TEXT_LEVEL, PipelineModel, component_of
from ..errors import AdapterError, TargetError, listing
from ..layers.targets import module_names
from .state import base_parameters


def live_names(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Return the model's name for each of the adapter's modules and saved parameters that it has under another name.

    Raises TargetError where several of a pipeline's components fit.
    """
    known = set(module_names(model))
    if adapter.saved:
        known.update(name for name, _ in base_parameters(model, every_name=True))
    by_component: dict[str, dict[str, str]] = {}  # component, "" for none -> name: what follows the component
    for name in (*adapter.updates, *adapter.saved):
        if name not in known:
            component = component_of(name) or ""
            by_component.setdefault(component, {})[name] = name.removeprefix(f"{component}.")
    bare = by_component.pop("", {})
    if isinstance(model, PipelineModel):
        fixed = [_match(rests, f"{component}.", known) for component, rests in by_component.items()]
        choices = {component: _match(bare, f"{component}.", known) for component in model.components}
    else:
        fixed = [_match(bare, "", known)]
        choices = {component: _match(rests, "", known) for component, rests in by_component.items()}
    choices = {component: match for component, match in choices.items() if match}
    if len(choices) > 1:
        fix = (
            f"say which: adapter.rename({{'': '{next(iter(choices))}'}})"
            if isinstance(model, PipelineModel)
            else f"attach it to the pipeline, or one part of it: adapter.select('{next(iter(choices))}[.].*')"
        )
        raise TargetError(f"the adapter's modules fit as those of {' and of '.join(choices)}\n  {fix}")
    return {name: live for match in (*fixed, *choices.values()) for name, live in match.items()}


def _match(rests: Mapping[str, str], front: str, known: Collection[str]) -> dict[str, str]:
    """Name -> the model's, for those that it has with this front, with or without the level `text_model`."""
    level = f"{TEXT_LEVEL}."
    found = {}
    for name, rest in rests.items():
        live = next((n for r in (rest, rest.removeprefix(level), level + rest) if (n := front + r) in known), None)
        if live is not None:
            found[name] = live
    return found


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Return the adapter with other names of modules and saved parameters. Raises AdapterError if two become one."""
    if not names:
        return adapter
    new = [names.get(name, name) for name in (*adapter.updates, *adapter.saved)]
    twice = next((name for name in new if new.count(name) > 1), None) if len(set(new)) < len(new) else None
    if twice is not None:
        both = [name for name in (*adapter.updates, *adapter.saved) if names.get(name, name) == twice]
        raise AdapterError(
            f"the adapter has two updates of the module '{twice}': {listing(both)}\n  keep one: adapter.prune([...])"
        )
    config, tokens = adapter.config, adapter.config.trainable_tokens
    if isinstance(tokens, Mapping):
        config = config.replace(trainable_tokens={names.get(m, m): list(ids) for m, ids in tokens.items()})
    if isinstance(config.targets, list):
        config = config.replace(targets=[names.get(m, m) for m in config.targets])
    updates = {names.get(m, m): update for m, update in adapter.updates.items()}
    return replace(
        adapter, config=config, updates=updates, saved={names.get(n, n): t for n, t in adapter.saved.items()}
    )
