"""What the task `preference` is made of: its losses (`losses/`, a file each) and their settings, what the model gave
to the answers before training (`reference`), the log-probabilities that losses are computed from (`scores`), and the
figures of an evaluation (`measures`).
"""
