"""What happened to the rows of a validation file that are not evaluated as they are, for the start panel."""

from __future__ import annotations

from collections.abc import Mapping


def held_out_notes(
    source: str, notes: Mapping[str, int], limit: int | str, cut: int = 0, dropped: int = 0
) -> dict[str, int]:
    """Return notes on a validation file's rows, each of which names the file: message -> number of rows.

    notes: what reading the rows said; limit: tokens of the longest row, that of the training rows; cut, dropped: rows
    over it.
    """
    made = {f"{note} (in {source})": count for note, count in notes.items()}
    if cut:
        made[f"of {source} are longer than {limit} tokens, the training rows' limit, and are evaluated cut"] = cut
    if dropped:
        made[f"of {source} are longer than {limit} tokens and are not evaluated"] = dropped
    return made
