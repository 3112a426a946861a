"""`lorakit bench train-step` as a script; what it measures and how is in lorakit/bench/train_step.py."""

import sys

from lorakit.cli import main

main(["bench", "train-step", *sys.argv[1:]])
