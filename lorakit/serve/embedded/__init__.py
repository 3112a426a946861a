"""The embedded engine: many adapters mixed in one batch of a model in this process."""
