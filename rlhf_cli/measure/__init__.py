"""Measuring a policy: exactly on enumerable prompts (exact.py), from samples on free text (sampled.py)."""
