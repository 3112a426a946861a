"""Who may ask for what, and how much: hosts, keys, bounds, allowed roots."""
