"""Virtual tokens in front of each row: the adapted body of a transformers model, and what its three kinds share."""
