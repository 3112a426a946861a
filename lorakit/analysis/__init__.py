"""What is in an adapter: inspect one, compare two, hold one against its base, draw heat maps."""
