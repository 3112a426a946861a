"""Training: the loop (`loop.py`), and one file for each thing it does."""
