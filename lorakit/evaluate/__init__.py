"""Evaluate a model and its adapters: loss and perplexity, generated text against references.

`evaluate` compares the base and its adapters; `figures` is about any task's own measures, `metrics` about texts.
"""
