"""`lorakit bench latency` as a script; what it measures and how is in lorakit/bench/latency.py."""

import sys

from lorakit.cli import main

main(["bench", "latency", *sys.argv[1:]])
