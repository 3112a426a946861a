"""Find the modules whose rows `LoraConfig.trainable_tokens` trains: embeddings, and output layers that are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..adapter.virtual_tokens import BODY
from ..config import LoraConfig, Tokens, virtual_kind
from ..errors import ConfigError, TargetError, did_you_mean
from ..module_names import ends_with
from .swap import mixin_for
from .targets import module_names

INPUT, OUTPUT = "input_embeddings", "output_embeddings"


def token_modules(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return the token ids to train, ascending, by the modules' full names; empty if the config names none.

    A list is for the model's input embedding, or, with variant "tokens", for each target; `INPUT` and `OUTPUT` name a
    transformers model's embedding and, unless it is tied to that, its output layer. Raises TargetError for a name that
    no module has, and for a model without an input embedding; ConfigError for tokens that are not ids.
    """
    wanted = config.trainable_tokens
    if not wanted or (config.variant == "tokens" and not isinstance(wanted, Mapping)):
        return {}  # or the targets themselves
    names = module_names(model)
    wanted = wanted if isinstance(wanted, Mapping) else {INPUT: wanted}
    trained: dict[str, set[int]] = {}
    for ending, tokens in wanted.items():
        for name in _named(ending, model, names):
            trained.setdefault(name, set()).update(_ids(tokens))
    return {name: tuple(sorted(ids)) for name, ids in trained.items() if ids}


def tokens_of(config: LoraConfig, module: str) -> tuple[int, ...]:
    """Return the ids of a module's trained tokens, ascending; empty if it has none.

    `module`: its full name, as a mapping in `trainable_tokens` has it once it is resolved for a model.
    """
    wanted = config.trainable_tokens
    return _ids(wanted.get(module, []) if isinstance(wanted, Mapping) else wanted)


def variant_of(config: LoraConfig, module: str) -> str:
    """Return the kind of update of a module. `module`: as for `tokens_of`."""
    if module == BODY and (kind := virtual_kind(config)) is not None:
        return kind
    return "tokens" if isinstance(config.trainable_tokens, Mapping) and tokens_of(config, module) else config.variant


def _part(model: nn.Module, getter: str, names: Mapping[str, nn.Module]) -> tuple[str, nn.Module] | None:
    """Return what a transformers model says is its embedding or its output layer, with its name."""
    get = getattr(model, getter, None)
    module = get() if get is not None else None
    return next(((name, module) for name, other in names.items() if module is not None and other is module), None)


def _named(ending: str, model: nn.Module, names: Mapping[str, nn.Module]) -> list[str]:
    if ending in (INPUT, OUTPUT):
        embedding, head = _part(model, f"get_{INPUT}", names), _part(model, f"get_{OUTPUT}", names)
        if embedding is None:
            raise TargetError(
                f"this {type(model).__name__} does not say which module its input embedding is "
                "(LoraConfig.trainable_tokens)\n"
                "  name it: trainable_tokens={'embed_tokens': [...]}"
            )
        if ending == INPUT:
            return [embedding[0]]
        # A tied output layer follows the embedding; a classifier has none.
        tied = head is None or head[1]._parameters.get("weight") is embedding[1]._parameters.get("weight")
        return [] if head is None or tied else [head[0]]
    found = [name for name in names if ends_with(name, ending)]
    if not found:
        raise TargetError(
            f"no module matches '{ending}' (LoraConfig.trainable_tokens)"
            + did_you_mean(ending, {name.rsplit(".", 1)[-1] for name in names})
        )
    return found


def _ids(tokens: Tokens) -> tuple[int, ...]:
    words = [token for token in tokens if not isinstance(token, int)]
    if words:
        raise ConfigError(
            f"trainable_tokens: {words[0]!r} is no token id, and there is no tokenizer here to look it up\n"
            "  give ids: tokenizer.convert_tokens_to_ids([...])"
        )
    ids = tuple(sorted({int(token) for token in tokens}))
    if ids and ids[0] < 0:
        raise ConfigError(f"trainable_tokens: a token id is 0 or more (got {ids[0]})")
    return ids


def repeated(modules: Mapping[str, nn.Module], same: Callable[[str, str], bool]) -> set[str]:
    """Return the modules that repeat the tokens of another one, with which they share the weight: tied embeddings.

    `modules`: those whose tokens are trained; `same`: whether two of them, by name, train the same tokens alike.
    """
    ordered = sorted(modules, key=lambda name: not isinstance(modules[name], nn.Embedding))
    found: set[str] = set()
    for position, name in enumerate(ordered):
        weight = modules[name]._parameters.get("weight")
        for other in ordered[:position]:
            if weight is not None and modules[other]._parameters.get("weight") is weight and same(other, name):
                found.add(name)
    return found


def sharing(model: nn.Module, modules: Mapping[str, nn.Module], trained: Mapping[str, object]) -> dict[str, str]:
    """Return the modules that share their weight with one whose tokens are trained: name -> that module's name.

    `modules`: those that the adapter changes; they have updates of their own. `trained`: names of those with tokens.
    """
    twins: dict[str, str] = {}
    own = {id(module) for module in modules.values()}
    for name in trained:
        weight = modules[name]._parameters.get("weight")
        for other, module in module_names(model).items():
            if weight is not None and id(module) not in own and module._parameters.get("weight") is weight:
                if mixin_for(module) is None:
                    raise TargetError(
                        f"'{name}' shares its weight with '{other}', a {type(module).__name__}, which lorakit cannot "
                        "keep tied (LoraConfig.trainable_tokens)"
                    )
                own.add(id(module))
                twins[other] = name
    return twins
