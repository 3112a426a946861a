"""Measures of tasks, as plain functions: predicted classes, numbers, spans, texts or rankings against true ones."""
