"""`lorakit bench mixed` as a script; what it measures and how is in lorakit/bench/mixed.py."""

import sys

from lorakit.cli import main

main(["bench", "mixed", *sys.argv[1:]])
