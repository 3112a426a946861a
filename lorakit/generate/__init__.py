"""Generate text with a model: greedy or sampled, in batches or streamed. `pictures`: with a pipeline."""
