"""Which modules a fused block can stand in for: those whose code, word for word, is code that the block was written for.

transformers repeats the same few forwards in some hundred models. A forward is known by the SHA-256 of its parameters' names and the
tokens of its body without comments and white space. A version that changes a word is not recognised: slower, never wrong.
`python -m lorakit.layers.recognise` prints the digests of the installed transformers' Llama.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable

_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@functools.cache
def digest(function: Callable) -> str:
    """The digest of a function, "" if its source cannot be had or is not all that runs."""
    if hasattr(function, "__wrapped__"):  # `inspect` would look through a decorator, which may do anything
        return ""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        (node,) = ast.parse(source).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return ""
    if not isinstance(node, ast.FunctionDef):
        return ""
    documented = len(node.body) > 1 and ast.get_docstring(node) is not None
    first = node.body[1 if documented else 0]
    body = textwrap.dedent("\n".join(source.splitlines()[first.lineno - 1 :]))
    words = [t.string for t in tokenize.generate_tokens(io.StringIO(body).readline) if t.type not in _SKIPPED]
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return hashlib.sha256(" ".join([*names, ":", *words]).encode()).hexdigest()[:16]


def main() -> None:
    from transformers.models.llama import modeling_llama as llama

    for function in (
        llama.LlamaMLP.forward,
        llama.LlamaRMSNorm.forward,
        llama.LlamaAttention.forward,
        llama.apply_rotary_pos_emb,
        llama.rotate_half,
    ):
        print(f"{digest(function)}  {function.__qualname__}")


if __name__ == "__main__":
    main()
