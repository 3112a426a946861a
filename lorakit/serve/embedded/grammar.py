"""Hold an answer to a JSON schema: which tokens may come next (llguidance, a parser over a trie of tokens).

    grammars = Grammars(tokenizer, ends=[2])
    matcher = await grammars.compiled('{"type": "object"}')   # a fresh one for each answer
    forbid(scores, [(row, matcher, end_ids), ...])            # in the engine's thread, before a token is picked
    matcher.add(token)                                        # after

End tokens are not left to llguidance, which knows one list of them for a tokenizer: each adapter has its own. They are
allowed where the answer may end, and nowhere else.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Cannot, EngineFailed
from . import schema_compiler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Compiled grammars: the schemas of a few dozen programs that ask again and again. Each takes up to 40 MB
# (`schema_compiler.LIMITS`), so more could fill the memory; most take far less than one.
KEPT = 32
PATIENCE = 20.0  # seconds of the clock to compile a schema, where the machine is busy or processes have no limits
# Computing masks may take this much processor time in the engine's thread, where other answers wait for it. Usual
# schemas take 0.01 to 0.5 ms a token.
FIRST_SECONDS, SECONDS_PER_TOKEN = 0.5, 0.005
_END = "<|lorakit: end of the answer|>"
_ADVICE = "docs/serve.md lists what a schema may have; or ask for JSON without a schema"


class Matcher:
    """Where one answer stands in its grammar. `ends`: the base's end tokens, allowed besides the request's own.

    Used by one thread at a time.
    """

    def __init__(self, state: Any, words: int, ends: frozenset[int], on_error: Callable[[], None]):
        self.ends = ends
        self.problem: str | None = None  # why the answer cannot go on
        self._state = state
        self._mask = np.zeros(words, np.int32)
        self._seconds_left = FIRST_SECONDS
        self._on_error = on_error

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, and no token can follow."""
        return bool(self._state.is_stopped()) and self.problem is None

    @property
    def may_end(self) -> bool:
        """Whether the answer satisfies the schema as it stands."""
        return bool(self._state.is_accepting()) and self.problem is None

    def add(self, token: int) -> EngineFailed | None:
        """Go on by a token. Return an error if that is not possible."""
        self._state.consume_token(token)
        return self.error()

    def allowed(self) -> np.ndarray:
        """Return the tokens that may come next as bits, little end first: [bytes of the vocabulary], uint8."""
        before = time.thread_time()
        self._state.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._seconds_left += min(SECONDS_PER_TOKEN - (time.thread_time() - before), 0)
        if self.error() is not None:
            self._mask[:] = 0
        return self._mask.view(np.uint8)

    def error(self) -> EngineFailed | None:
        """Return why the answer cannot go on, None if it can."""
        if self.problem is None and self._state.is_error():
            self.problem = _short(self._state.get_error())
        if self.problem is None and self._seconds_left < 0:
            self.problem = "it takes too much processor time"
        if self.problem is None:
            return None
        self._on_error()
        return EngineFailed(
            f"the answer could not be held to the schema: {self.problem}\n"
            "  use a simpler one: fewer optional properties, shorter patterns, less nesting",
            heals=False,
        )


class Grammars:
    """The compiled grammars of a tokenizer, the most recently used ones kept. May be called from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = (), kept: int = KEPT):
        """Make an empty cache. The tokenizer is converted at the first schema.

        ends: the base's end tokens; the tokenizer's own if there are none.
        """
        own = getattr(tokenizer, "eos_token_id", None)
        self.ends = frozenset(ends) or frozenset(() if own is None else (own,))
        self._tokenizer = tokenizer
        self._kept = kept
        self._converted: Any = None
        # A schema's hash to its matcher at the start, or what is wrong with it.
        self._known: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()  # for `_known`
        self._compiling = threading.Lock()  # one at a time: hostile schemas must not take all processors
        # Their own thread, so that requests that wait for a slow schema do not take those of other work.
        self._thread = ThreadPoolExecutor(1, "schemas")

    async def compiled(self, schema: str) -> Matcher:
        """Return a fresh matcher for an answer; the event loop goes on. Raises as `matcher`.

        A schema seen before does not wait behind others.
        """
        key = _key(schema)
        found = self._copy(key)
        if found is not None:
            return self._fresh(key, found)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.matcher, schema)

    def matcher(self, schema: str) -> Matcher:
        """Return a fresh matcher for an answer.

        It takes microseconds for a schema seen before, about 0.1 s for another and at most some seconds. Raises
        Cannot("schema") for a schema that is not valid, not supported or too complex, for tokenizers that llguidance
        cannot read, and without llguidance.
        """
        key = _key(schema)
        found = self._copy(key)
        if found is None:
            with self._compiling:
                found = self._copy(key) or self._compile(key, schema)
        return self._fresh(key, found)

    def close(self) -> None:
        """Drop the schemas that still wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fresh(self, key: str, found: Any) -> Matcher:
        if isinstance(found, str):
            raise Cannot(f"{found}\n  {_ADVICE}", "schema")
        words = -(-self._converted.vocab_size // 32)
        return Matcher(found, words, self.ends, lambda: self._forget(key))

    def _copy(self, key: str) -> Any:
        """Return a copy of a known grammar's start or its problem; None if it is not known."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            known = self._known[key]
            return known if isinstance(known, str) else known.deep_copy()

    def _compile(self, key: str, schema: str) -> Any:
        text = _as_object(schema)
        if self._converted is None:
            self._converted = _converted(self._tokenizer)
        problem = _problem(text)
        known = None
        if problem is None:
            known, problem = schema_compiler.compiled(text, self._converted)
        with self._lock:
            self._known[key] = known if problem is None else f"the schema cannot be used: {_short(problem)}"
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        found = self._copy(key)
        assert found is not None, "only `_compiling` adds grammars, and it is held"
        return found

    def _forget(self, key: str) -> None:
        """Drop a grammar whose answer failed: its copies share states, which may have reached their limit."""
        with self._lock:
            self._known.pop(key, None)


def forbid(scores: Tensor, rows: Sequence[tuple[int, Matcher, Collection[int]]]) -> None:
    """Set the logits of tokens that a grammar does not allow to -inf, in place.

    scores: [all rows, vocab]. rows: (row, matcher, its end tokens). A row whose grammar failed loses all of its tokens.
    """
    vocab = scores.shape[-1]
    bits = np.stack([matcher.allowed() for _, matcher, _ in rows])
    known = np.unpackbits(bits, axis=1, count=min(vocab, bits.shape[1] * 8), bitorder="little")
    allowed = np.zeros((len(rows), vocab), bool)  # the vocabulary of the logits may be larger: rows without a token
    allowed[:, : known.shape[1]] = known
    for at, (_, matcher, ends) in enumerate(rows):
        allowed[at, [token for token in ends if token < vocab]] = matcher.may_end
    index = torch.tensor([row for row, _, _ in rows], device=scores.device)
    outside = torch.from_numpy(~allowed).to(scores.device)
    scores[index] = scores[index].masked_fill(outside, float("-inf"))


def _key(schema: str) -> str:
    return hashlib.sha256(schema.encode("utf8", "surrogatepass")).hexdigest()


def _as_object(schema: str) -> str:
    """Return the schema as the text of a JSON object; `true` is one that anything satisfies."""
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise Cannot(f"the schema is not JSON: {_short(str(error))}\n  expected a JSON schema", "schema") from None
    if value is True:
        return "{}"
    if not isinstance(value, dict):
        raise Cannot(f"the schema is {_short(schema)}\n  expected a JSON object", "schema")
    return schema


def _converted(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the tokenizer in llguidance's form, with one more token, an end that no model picks."""
    try:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer
    except ImportError:
        raise Cannot("JSON schemas need llguidance\n  pip install 'lorakit[serve]'", "schema") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = type(tokenizer).__name__
    if backend is None:
        raise Cannot(f"JSON schemas need a fast tokenizer; this base has a {name}", "schema")
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.add_special_tokens([_END])
    try:
        return LLTokenizer(copy.to_str(), eos_token=copy.token_to_id(_END))
    except ValueError as error:
        raise Cannot(f"JSON schemas do not work with this base's {name}: {_short(str(error))}", "schema") from None


def _problem(schema: str) -> str | None:
    """Compile the schema in another process. Return what is wrong with it, None if it can be compiled here too."""
    seconds, size = schema_compiler.CPU_SECONDS, schema_compiler.MEMORY_BYTES
    command = [sys.executable, "-P", os.path.abspath(schema_compiler.__file__), str(seconds), str(size)]
    try:
        done = subprocess.run(command, input=schema.encode(), capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:  # maybe the machine is busy, so this is not remembered
        raise Cannot(f"the schema takes more than {PATIENCE:g} s to compile\n  {_ADVICE}", "schema") from None
    if done.returncode > 0:
        last = done.stderr.decode("utf8", "replace").strip().rpartition("\n")[2]
        return f"its compiler failed: {last}"
    if done.returncode < 0:  # a signal: one of the limits
        return f"compiling it takes more than {seconds} s or {size >> 20:,} MB"
    problem: str | None = json.loads(done.stdout)["problem"]
    return problem


def _short(text: str, most: int = 200) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= most else line[: most - 1] + "…"
