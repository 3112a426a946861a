"""A model card (README.md) for an adapter, from what is known of it and nothing else.

    card = card_of("runs/first", license="apache-2.0", base_model="Qwen/Qwen3-0.6B")
    card.text, card.missing          # the page; what it could not say, each with the way to give it

What an adapter's file says of itself was written by somebody else: it is shown as text, never as Markdown, HTML or YAML. Paths of the
machine it was made on are cut to their last name.
"""

from __future__ import annotations

from .card import Card, card_of
from .page import MARK, PLACEHOLDER, ours, write

__all__ = ["MARK", "PLACEHOLDER", "Card", "card_of", "ours", "write"]
