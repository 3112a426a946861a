"""What text tasks share: settings, the loss over trained tokens, perplexity."""
