"""`lorakit bench`: our figures on the user's machine. One file a table; `measure.py` is how all of them measure."""
