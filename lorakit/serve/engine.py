"""The engine's seam: token ids go in, token ids come out. All that a request means in words is decided above it.

    facts = await engine.start()
    await engine.load(key, source)                        # key: a hash of the adapter's contents
    ticket = engine.submit(Work(ids, ((key, 1.0),), Sampling(max_tokens=64)))
    async for piece in ticket: ...                        # the last piece has `finish`
    await engine.unload(key); await engine.stop(drain=10)

Chat templates, stop texts, public names, tools and errors live above it, so that two engines answer alike. An adapter
is known here by its content alone: a file that changes gets another key, so no cache of an engine can mix up versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .errors import Cannot, TooLong
from .ticket import Ticket

if TYPE_CHECKING:
    from ..adapter.adapter import Adapter

Choice = tuple[tuple[str, float], ...]  # (an adapter's key, its weight), ...; () is the base alone
Finish = Literal["stop", "length", "cancelled", "timeout"]
Ability = Literal["mix", "scale", "schema", "logprobs", "logit_bias", "min_p", "repetition"]
BASE: Choice = ()
TEXT_TASKS = (None, "CAUSAL_LM")  # PEFT's task types of adapters that continue text, which is what an engine serves


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked, and when the answer ends.

    Penalties as OpenAI defines them: `presence` and `frequency` are subtracted from the logits of tokens of the answer;
    `repetition` (Keskar et al. 2019, CTRL) divides the positive logits, and multiplies the negative ones, of tokens of
    prompt and answer. Order, as in vLLM: bias and grammar, penalties, temperature, then min_p, top_k, top_p.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # tokens less likely than this part of the likeliest one are left out
    seed: int | None = None  # the same seed, prompt and choice give the same answer, whatever else is in the batch
    stop_ids: frozenset[int] = frozenset()  # end the answer, and are not part of it
    logprobs: int | None = None  # alternatives to report for each token (0: only the token itself); None: no report
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    schema: str | None = None  # a JSON schema, as text, that the answer must satisfy; "{}" is any JSON value


@dataclass(frozen=True)
class Work:
    """A request for one answer. ids: the prompt. deadline: on time.monotonic()'s clock; then it ends as "timeout"."""

    ids: tuple[int, ...]
    choice: Choice
    sampling: Sampling
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a picked token, and the likeliest `alternatives` (token, log probability), likeliest first.

    Both under the model's own distribution (softmax of the raw logits), as OpenAI's and vLLM's servers report.
    """

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New tokens of an answer, without a stop token. `finish`: set in the last piece, which may have no tokens.

    logprobs: one for each id if they were asked for. cached: tokens of the prompt that were not computed again, given
    with one piece: the first, or the last where vLLM reports it no earlier.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    cached: int = 0


@dataclass(frozen=True)
class Facts:
    """What an engine serves. context: positions for prompt and answer together."""

    base: str
    context: int
    vocabulary: int
    can: frozenset[Ability]
    max_logprobs: int = 20


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, for `/metrics` and `/health`. Counts since the start, unless named otherwise."""

    running: int = 0  # now
    waiting: int = 0  # now
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    on_device: int = 0  # adapters, now
    in_memory: int = 0  # adapters, now
    memory_bytes: int = 0  # of those in memory, now
    loads: int = 0  # adapters brought to the device
    evictions: int = 0
    # time.monotonic() of the last sign that it computes: the end of a step or of a chunk of a prompt, or the admission
    # of a request after it was idle. None before the first.
    last_step: float | None = None
    alive: bool = True


class Source(Protocol):
    """Where an adapter's values come from. An engine reads them when it needs them, again after it dropped them."""

    @property
    def label(self) -> str:
        """The adapter's public name, for messages."""

    def read(self) -> Adapter:
        """Read the values. Called off the event loop. Raises AdapterError if they are not those of the key any more."""


class Engine(Protocol):
    """What `embedded` and `vllm` do. All methods are called in the event loop's thread."""

    async def start(self) -> Facts:
        """Be ready for `submit`. Raises LorakitError; `stop` then frees what was begun."""

    def submit(self, work: Work) -> Ticket:
        """Queue a request. Raises Busy, Stopping, UnknownAdapter (a key that is not loaded), and what `check` raises.

        From here on `unload` waits for it. What shows only later (a schema that cannot be compiled) is raised by the
        ticket, before its first piece.
        """

    async def load(self, key: str, source: Source, *, pin: bool = False) -> None:
        """Make an adapter usable: read, check against the base, and attach between two steps.

        Of a key that is loaded, only the pin changes. A pinned adapter stays on the device. Of a key that is being
        unloaded, the unload is taken back, and returns 0 (embedded), or UnknownAdapter is raised: load it again once it
        has gone (vLLM, which cannot take it back). Raises AdapterError for what this engine or base cannot serve; what
        runs is not touched.
        """

    async def unload(self, key: str) -> int:
        """Forget an adapter once its requests are done; new ones are refused at once. Return the bytes freed."""

    def stats(self) -> Stats:
        """Return counts as of now."""

    async def stop(self, drain: float) -> None:
        """Refuse new work, give running requests `drain` seconds, cancel the rest, and free what is held."""


def choice_of(parts: Iterable[tuple[str, float]]) -> Choice:
    """Return a choice with each key once, in a fixed order, without those of weight 0: equal ones are the same then.

    The weights of a key that is named more than once are added up.
    """
    weights: dict[str, float] = {}
    for key, weight in parts:
        weights[key] = weights.get(key, 0.0) + weight
    return tuple(sorted((key, weight) for key, weight in weights.items() if weight))


def check(work: Work, facts: Facts) -> None:
    """Raise for what no engine with these facts can do. Each engine's `submit` calls it.

    Raises Cannot for an empty prompt, tokens that the base does not have, no tokens to answer, too many logprobs, and a
    schema where there are none; TooLong for more positions than the context has.
    """
    ids, sampling = work.ids, work.sampling
    if not ids:
        raise Cannot("the prompt is empty\n  expected at least one token", "prompt")
    if not 0 <= min(ids) <= max(ids) < facts.vocabulary:
        wrong = next(i for i in ids if not 0 <= i < facts.vocabulary)
        raise Cannot(f"the prompt has the token {wrong}; the base has tokens 0 to {facts.vocabulary - 1}", "prompt")
    if sampling.max_tokens < 1:
        raise Cannot(f"max_tokens is {sampling.max_tokens}; expected at least 1", "max_tokens")
    if len(ids) + sampling.max_tokens > facts.context:
        left = facts.context - len(ids)
        fix = f"shorten the prompt, or lower max_tokens to {left}" if left > 0 else "shorten the prompt"
        raise TooLong(
            f"the prompt has {len(ids)} tokens and max_tokens is {sampling.max_tokens}; the context has "
            f"{facts.context}\n  {fix}"
        )
    if (sampling.logprobs or 0) > facts.max_logprobs:
        raise Cannot(f"logprobs is {sampling.logprobs}; expected up to {facts.max_logprobs}", "logprobs")
    if sampling.schema is not None and "schema" not in facts.can:
        raise Cannot("this engine was started without grammars, so it has no JSON mode", "schema")
