"""Typed configuration: schemas with ranges (schema.py), composed from yaml and command line (compose.py)."""
