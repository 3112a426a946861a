"""The byte tokenizer and tiny models, as fixtures."""

from __future__ import annotations

from byte_models import gpt2, llama, make_item, t5, tokenizer  # noqa: F401
