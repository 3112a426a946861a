"""Match module names by PEFT's rules: `targets`, `exclude`, and the keys of `rank_pattern` and `alpha_pattern`.

A pattern's key is a regular expression; it matches a module if `re.match(rf"(.*\\.)?({key})$", name)` does
(peft.utils.get_pattern_key), and the first key that matches wins.

An adapter may have one key for each of a thousand modules, and a million regex matches take most of a minute. Almost
all of these keys are plain names, some with a leading "^", so `Patterns` looks them up in dicts instead. An unescaped
dot in such a key matches any character: keys are grouped by length and by the positions of their dots, and a name is
looked up in each group of its length, with the characters at those positions left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# What follows "transformer." in language models with such a trunk (GPT-2, GPT-J, BLOOM, Falcon, MPT, ChatGLM, XLNet,
# LlamaForQuestionAnswering, ...). A diffusion pipeline's component of that name has transformer_blocks, blocks.N.attn1
# and the like.
_LANGUAGE_TRUNK = re.compile(
    r"transformer\.(h|wte|wpe|word_embeddings(_layernorm)?|embedding|ln_f|norm_f|output_layer|layer\.\d+|encoder\.layers"
    r"|embed_tokens|layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.down_proj|(input|post_attention)_layernorm)$"
    r"|blocks\.\d+\.((attn\.(Wqkv|out_proj)|ffn\.(up|down)_proj|norm_[12])$|norm_attn_norm))(\.|$)"
)
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.|\\?-)+")


def is_language_trunk(module: str) -> bool:
    """Whether a name that begins with "transformer." is a language model's, not a diffusion pipeline's."""
    return _LANGUAGE_TRUNK.match(module) is not None


def compiled(key: str) -> re.Pattern[str]:
    """Compile PEFT's rule for a pattern's key. Raises re.error."""
    return re.compile(rf"(.*\.)?({key})$")


def plain(key: str) -> bool:
    """Whether a key is a plain name: no regex syntax in it but dots and a leading "^"."""
    return _PLAIN.fullmatch(key) is not None


def ends_with(module: str, ending: str) -> bool:
    """Whether a module's full name is `ending` or ends in `.ending` (PEFT's rule for lists)."""
    return module == ending or module.endswith("." + ending)


def matches(module: str, names: str | list[str]) -> bool:
    """Whether `names` matches a module: a list by ending, a string as a regex for the full name (PEFT's rules)."""
    if isinstance(names, list):
        return any(ends_with(module, name) for name in names)
    return re.fullmatch(names, module) is not None


def pattern_matches(key: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches a module (PEFT's rule)."""
    return compiled(key).match(module) is not None


class Patterns:
    """A rank_pattern or alpha_pattern with fast lookup of the first key that matches a module's name."""

    def __init__(self, pattern: Mapping[str, Any]):
        self.keys, self.values = list(pattern), list(pattern.values())
        self.expressions: list[tuple[int, re.Pattern[str]]] = []  # (index, regex) of keys that are not plain names
        # [anchored by "^"][length][positions of unescaped dots] -> {the other characters: index of the first such key}
        self.names: dict[bool, dict[int, dict[tuple[int, ...], dict[str, int]]]] = {True: {}, False: {}}
        for index, key in enumerate(pattern):
            if plain(key):
                self._add(index, key)
            else:
                self.expressions.append((index, compiled(key)))

    def value(self, name: str, default: Any) -> Any:
        """Return the value of the first key that matches `name`, `default` if none does."""
        index = self.first(name)
        return default if index is None else self.values[index]

    def first(self, name: str) -> int | None:
        """Return the index of the first key that matches `name`, None if none does."""
        if "\n" in name:  # regex dots do not match a newline and "$" ignores a final one: try every key
            return next((index for index, key in enumerate(self.keys) if compiled(key).match(name)), None)
        best = min(self._looked_up(name), default=len(self.values))
        for index, expression in self.expressions:
            if index > best:
                break
            if expression.match(name):
                return index
        return best if best < len(self.values) else None

    def _add(self, index: int, key: str) -> None:
        anchored, key = key.startswith("^"), key.removeprefix("^")
        # An escaped dot matches a dot, an unescaped one any character.
        characters = re.findall(r"\\?.", key)
        dots = tuple(i for i, character in enumerate(characters) if character == ".")
        rest = "".join(character[-1] for character in characters if character != ".")
        self.names[anchored].setdefault(len(characters), {}).setdefault(dots, {}).setdefault(rest, index)

    def _looked_up(self, name: str) -> Iterator[int]:
        yield from self._in(self.names[True], name)
        start = 0
        while True:  # the full name, then what follows each of its dots
            yield from self._in(self.names[False], name[start:])
            start = name.find(".", start) + 1
            if not start:
                return

    @staticmethod
    def _in(groups: dict[int, dict[tuple[int, ...], dict[str, int]]], name: str) -> Iterator[int]:
        for dots, keys in groups.get(len(name), {}).items():
            between_dots, start = [], 0
            for dot in dots:
                between_dots.append(name[start:dot])
                start = dot + 1
            index = keys.get("".join([*between_dots, name[start:]]))
            if index is not None:
                yield index
