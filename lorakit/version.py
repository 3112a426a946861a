"""The version, alone, so that `lorakit --version` and the build read it without importing anything."""

VERSION = "0.1.0"
