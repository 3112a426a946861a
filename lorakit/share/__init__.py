"""Write a model card (README.md) for an adapter, from what is known about it and nothing else.

    card = card_of("runs/first", license="apache-2.0", base_model="Qwen/Qwen3-0.6B")
    card.text, card.missing          # the page; what is not known, each with the option that provides it

What an adapter's file says about itself is untrusted: it is shown as text, never as Markdown, HTML or YAML. Local paths
are cut to their last component.
"""

from __future__ import annotations

from .card import Card, card_of, ours, write

__all__ = ["Card", "card_of", "ours", "write"]
