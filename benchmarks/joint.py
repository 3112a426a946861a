"""`lorakit bench joint` as a script; what it measures and how is in lorakit/bench/joint.py."""

import sys

from lorakit.cli import main

main(["bench", "joint", *sys.argv[1:]])
