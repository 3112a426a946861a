"""Parts of serve_faults.py: the server's process, adapters, witnesses, and what is done to the server."""
