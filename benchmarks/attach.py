"""`lorakit bench attach` as a script; what it measures and how is in lorakit/bench/attach.py."""

import sys

from lorakit.cli import main

main(["bench", "attach", *sys.argv[1:]])
