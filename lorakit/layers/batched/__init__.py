"""Batches whose rows have adapters of their own: which adapter each row uses, and factors stacked for few products."""
