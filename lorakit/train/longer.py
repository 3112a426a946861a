"""Make a run longer than it was started with: more epochs or steps, or more patience, in its own folder.

    lorakit train --config runs/first/config.yaml --epochs 5        # runs/first ended at 3

It resumes from its newest checkpoint with its optimizer. From there on, the learning rate follows the longer run's
schedule, so the result is not that of a run that had this length from the start; the adapter's record says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .early_stop import EarlyStop

LENGTH = {"epochs", "steps", "patience"}


def why_not(state: Mapping[str, Any], patience_then: int, patience_now: int, steps: int) -> str | None:
    """Say why a run cannot have this length; None if it can.

    `state`: of its newest checkpoint; `patience_then`, `patience_now`: 0 never stops early; `steps`: its new total.
    """
    planned = state["steps"]
    if steps < planned:
        return f"a run can be made longer, not shorter: it was planned for {planned:,} steps, and this is {steps:,}"
    if (patience_now or math.inf) < (patience_then or math.inf):
        return "patience can be raised, or set to 0 (never stop), not lowered"
    early = EarlyStop(patience_now, **state["early_stop"])
    if early.stop:
        return (
            f"it stopped early at step {state['step']:,}, with no better held-out loss since step {early.best_step:,}; "
            f"to go on, raise patience above {early.since} too, or set it to 0"
        )
    return None
