"""Many runs on one base at once: sweeps over settings, their table, and the search for a learning rate."""
