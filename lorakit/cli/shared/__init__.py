"""What several verbs share: options, settings as flags and YAML, reading and writing adapters, the line that says it has begun."""
