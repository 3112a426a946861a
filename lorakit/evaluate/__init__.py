"""Judging a model and its adapters: loss and perplexity, generated text against references, facts against their slots.

`compare` puts the base and its adapters side by side and uses the rest: `perplexity` and `generate` run the model, `metrics`
and `slots` only read text.
"""
