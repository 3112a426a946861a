"""Estimate a training run's memory and time before it starts, from the base's config alone."""
