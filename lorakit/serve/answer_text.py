"""An answer's text while its tokens arrive: whole characters only, and nothing that may become a stop text.

    text = AnswerText(TokenTexts(tokenizer), stop=["\\n\\n"])
    for ids in pieces: send(text.feed(ids)); if text.stopped: cancel
    send(text.finish())

All that is sent, joined, is what `lorakit generate` returns for these ids: special tokens are left out, and the text
ends before the first stop text. Where a family writes its tool calls with special tokens (Mistral's [TOOL_CALLS],
Llama's <|python_tag|>, gpt-oss' <|channel|>), a parser of calls has to see them: those in `keep` are written as their
text. `Prompt.keep` has them, and only if the request has tools that may be called.

Each token is decoded together with the few before it since the last whole character but one, as tokenizers that put a
space before each text would otherwise lose it. So time is linear in the answer's length.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection, Sequence
from typing import Any

from ..data.end_tokens import added_tokens
from .partial_end import partial_end

UNFINISHED = "\ufffd"  # tokenizers decode bytes that are not (yet) a character to this
# A window that never ends with a whole character is given up after this many tokens; a character has four bytes.
LONGEST_WINDOW = 32


class TokenTexts:
    """What a tokenizer's tokens look like on their own. One object serves all answers; what it finds out it keeps."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._added = frozenset(added_tokens(tokenizer))
        self._special: dict[int, bool] = {}
        self._bytes: dict[int, builtins.bytes] = {}
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor: list[int] = anchor[-1:]
        self._anchor_text = self.decode(self._anchor)
        self._table = _byte_table()
        spelled = [token for i in tokenizer.encode("aé", add_special_tokens=False) for token in self._token(i)]
        spelt = bytes(self._table.get(letter, 0) for letter in spelled)
        self._is_byte_level = spelt.lstrip(b" ") == "aé".encode()  # some put a space before every text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of texts."""
        if token not in self._added:
            return False
        if token not in self._special:
            self._special[token] = self.decode([token]) == "" != self._token(token)
        return self._special[token]

    def bytes(self, token: int) -> builtins.bytes:
        """Return the bytes of a token, special tokens included: UTF-8, perhaps part of a character."""
        if token not in self._bytes:
            self._bytes[token] = self._bytes_of(token)
        return self._bytes[token]

    def text(self, token: int) -> str:
        r"""Return a token as log probabilities name it: its text; where it is part of a character, "bytes:\xe2\x82"."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{each:02x}" for each in raw)

    def _token(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token) or "")

    def _bytes_of(self, token: int) -> builtins.bytes:
        written = self._token(token)
        if token in self._added:
            return written.encode()
        if self._is_byte_level and all(letter in self._table for letter in written):
            return bytes(self._table[letter] for letter in written)
        if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):  # SentencePiece's bytes
            return bytes.fromhex(written[3:5])
        return self.decode([*self._anchor, token])[len(self._anchor_text) :].encode()


class AnswerText:
    """The text of one answer. stop: texts to end before. keep: special tokens to write. `stopped`: a stop text came."""

    def __init__(self, texts: TokenTexts, stop: Sequence[str] = (), keep: Collection[int] = ()):
        self._texts, self._keep = texts, frozenset(keep)
        self._stop = tuple(text for text in stop if text)
        self.stopped = False
        self._held = ""  # text that may become a stop text
        self._window: list[int] = []  # the ids decoded together
        self._whole = 0  # of them, up to the last whole character
        self._sent = 0  # characters of the window's text that are given out

    def feed(self, ids: Sequence[int]) -> str:
        """Take the next ids. Return the text that is certain by now. After a stop text it is always ""."""
        found = []
        for token in ids:
            if self.stopped:
                break
            found.append(self._before_stop(self._text_of(token)))
        return "".join(found)

    def finish(self) -> str:
        """Return what was held back: the answer is at its end. Bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        last = self._before_stop(self._rest())
        held, self._held = self._held, ""
        return last if self.stopped else last + held

    def _text_of(self, token: int) -> str:
        if self._texts.is_special(token):
            if token not in self._keep:
                return ""
            return self._rest() + self._texts.bytes(token).decode()
        self._window.append(token)
        text = self._texts.decode(self._window)
        if len(self._window) > LONGEST_WINDOW:
            new, self._window, self._whole, self._sent = text[self._sent :], [], 0, 0
            return new
        complete = text.rstrip(UNFINISHED)
        new = complete[self._sent :]
        self._sent += len(new)
        if new and len(complete) == len(text):
            # All is whole here. What came since the last such place stays as context, so that spaces come out right.
            self._window = self._window[self._whole :]
            self._whole = len(self._window)
            self._sent = len(self._texts.decode(self._window))
        return new

    def _rest(self) -> str:
        rest = self._texts.decode(self._window)[self._sent :] if self._window else ""
        self._window, self._whole, self._sent = [], 0, 0
        return rest

    def _before_stop(self, text: str) -> str:
        if not self._stop or not text:
            return text
        text, self._held = self._held + text, ""
        at = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            return text[:at]
        keep = partial_end(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _backend(tokenizer: Any) -> Any:
    """Return what `tokenizer.decode` calls, None if it does more than that.

    A server decodes every token of every stream twice: 2 µs by the backend, 11 by the method around it.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    own = getattr(kind, "decode", None), getattr(kind, "_decode", None)
    theirs = PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode
    return tokenizer.backend_tokenizer if own == theirs else None


def _byte_table() -> dict[str, int]:
    """Return which byte each letter of byte-level BPE stands for (GPT-2: Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
