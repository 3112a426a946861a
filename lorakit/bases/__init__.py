"""Loading base models: the embedded one, a folder, or a hub id; and choosing device and precision, with the reason."""
