"""Batches that mix adapters: which adapter each row uses, and stacked factors for few matrix products."""
