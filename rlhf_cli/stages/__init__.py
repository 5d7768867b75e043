"""One file per command, each a short story; stages meet only in the store (provide.py)."""
