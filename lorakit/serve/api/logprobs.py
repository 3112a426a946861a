r"""Log probabilities in the two forms of OpenAI's API.

A token may be a part of a character: it is then shown as its bytes, "bytes:\xe2\x82", as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine import TokenLogprob
from .forms import ChatLogprob, TextLogprobs, TopLogprob

if TYPE_CHECKING:
    from ..answer_text import TokenTexts

LOWEST = -9999.0  # JSON has no -inf: OpenAI's value for a token that a grammar or a bias rules out


def chat_logprobs(tokens: Sequence[TokenLogprob], texts: TokenTexts) -> list[ChatLogprob]:
    """Return `logprobs.content` of a chat completion."""

    def one(token: int, logprob: float) -> TopLogprob:
        return {"token": texts.text(token), "logprob": max(logprob, LOWEST), "bytes": list(texts.bytes(token))}

    return [
        {**one(token.id, token.logprob), "top_logprobs": [one(*other) for other in token.alternatives]}
        for token in tokens
    ]


class TextLogprobWriter:
    """`logprobs` of a text completion. Offsets count the characters of the text so far, also over several chunks."""

    def __init__(self, texts: TokenTexts):
        """Write for one answer."""
        self._texts, self._offset = texts, 0

    def write(self, tokens: Sequence[TokenLogprob]) -> TextLogprobs:
        """Return the form for the next tokens."""
        form: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            shown = self._texts.text(token.id)
            form["tokens"].append(shown)
            form["token_logprobs"].append(max(token.logprob, LOWEST))
            # Two tokens may look alike; the likelier one is listed first and stays.
            likeliest: dict[str, float] = {}
            for other, logprob in token.alternatives:
                likeliest.setdefault(self._texts.text(other), max(logprob, LOWEST))
            form["top_logprobs"].append(likeliest)
            form["text_offset"].append(self._offset)
            self._offset += len(shown)
        return form
