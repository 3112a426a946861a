"""Parts of a model as one autograd node each, which keeps less for backward than the operations one by one."""
