"""What tasks on text share: settings, the loss over trained tokens, perplexity."""
