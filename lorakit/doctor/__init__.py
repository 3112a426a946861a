"""Report what this machine can do, for `lorakit doctor`.

The facts come from `versions.py`, `machine.py` and `fused.py`; `show.py` prints them.
"""
