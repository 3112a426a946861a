"""Training one adapter: the loop (`loop.py`) and what each of its steps does, one file each."""
