"""`lorakit bench`: our measurements on the user's machine. One table per file; all measure with `measure.py`."""
