"""What commands share: options, settings as flags and YAML, reading and writing adapters, the starting line."""
