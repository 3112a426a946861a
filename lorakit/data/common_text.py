"""What two texts have in common."""

from __future__ import annotations


def common_beginning(first: str, second: str) -> str:
    """Return the longest text that both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    return first[:length]


def longest_ending_within(text: str, other: str) -> str:
    """Return the longest ending of a text that another text has anywhere."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[len(text) - middle :] in other else (low, middle - 1)
    return text[len(text) - low :]
