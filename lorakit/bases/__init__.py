"""Load base models (the embedded one, a folder, or a hub id), and choose device and precision, with the reason."""
