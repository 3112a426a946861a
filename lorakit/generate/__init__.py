"""Text out of a model: greedy or sampled, batch by batch."""
