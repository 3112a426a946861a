"""What this machine can do, for `lorakit doctor`: facts in `versions.py`, `machine.py` and `fused.py`, on the terminal by `show.py`."""
