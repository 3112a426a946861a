"""The engine that runs the model in this process: one thread owns it, and every step serves all rows at once."""
