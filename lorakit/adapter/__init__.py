"""What an adapter is: a value that needs no model."""
