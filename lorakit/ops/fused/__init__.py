"""Parts of a model as one autograd node each, which saves less for backward than their separate operations."""
