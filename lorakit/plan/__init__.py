"""Memory and time of a training run before it starts, from the base's config alone."""
