"""Batches whose rows have adapters of their own: which rows share a product, and the products."""
