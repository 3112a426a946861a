"""`lorakit bench trainer` as a script; what it measures and how is in lorakit/bench/trainer.py."""

import sys

from lorakit.cli import main

main(["bench", "trainer", *sys.argv[1:]])
