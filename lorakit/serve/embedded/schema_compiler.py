"""Compile a JSON schema with llguidance, within bounds; as a program, try that in a process of its own.

    python -P schema_compiler.py 2 1073741824 < schema      # seconds, bytes; prints {"problem": text or null}

Some schemas keep llguidance's compiler busy without end: its limits do not count the work of intersecting patterns
(`allOf` of thirty short patterns, or of four `multipleOf`, did not finish in 30 s). A thread cannot be stopped, but a
process can, so a schema that was never seen is compiled in a process first. It imports nothing of lorakit, to start
quickly (90 ms), and uses a tokenizer of single bytes: what takes long does not depend on the tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# ", ", ": " and \u escapes are what json.dumps writes, so what many adapters learned. More white space is not allowed:
# a small model fills its answer with it. Options inside the schema ("x-guidance") do not change that.
OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allow_general_unicode_escapes": True,
}

# llguidance's own limits allow 0.9 s and 300 MB for the first mask of ^((a{1000}){1000}){1000}$; these 40 ms and 25 MB.
# A state takes 1 to 2 kB. Schemas with 50 properties or 4,000 enum values stay far below all of them.
LIMITS: Any = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
}

CPU_SECONDS = 2  # whole seconds; the slowest schema within LIMITS took 0.5
MEMORY_BYTES = 1 << 30


def compiled(schema: str, tokenizer: Any) -> tuple[Any, str | None]:
    """Return llguidance's matcher at the start of an answer, and what is wrong with the schema, if something is."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    except ValueError as error:
        return None, str(error)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS, verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()  # the start of a schema that nothing satisfies, or too many things, fails only here
    return matcher, matcher.get_error() or None


class _Bytes:
    """A tokenizer of single bytes, in the form that llguidance takes."""

    tokens = [*(bytes([value]) for value in range(256)), b"<end>"]  # noqa: RUF012
    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _limit_this_process(seconds: int, size: int) -> None:
    if sys.platform != "linux":  # elsewhere the parent's time limit alone counts
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main() -> None:
    _limit_this_process(int(sys.argv[1]), int(sys.argv[2]))
    from llguidance import LLTokenizer, TokenizerWrapper

    _, problem = compiled(sys.stdin.buffer.read().decode(), LLTokenizer(TokenizerWrapper(_Bytes())))
    print(json.dumps({"problem": problem}))


if __name__ == "__main__":
    _main()
