"""Measuring a policy: exactly on enumerable prompts, from samples, on candidate pools and on preference pairs."""
