"""Judging a model and its adapters: loss and perplexity, generated text against references.

`evaluate` puts the base and its adapters side by side and uses the rest: `tasks.text.perplexity` runs the model,
`metrics` only reads text.
"""
