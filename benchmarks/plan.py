"""`lorakit bench plan` as a script; what it measures and how is in lorakit/bench/plan.py."""

import sys

from lorakit.cli import main

main(["bench", "plan", *sys.argv[1:]])
