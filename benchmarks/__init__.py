"""Measurements: each module prints a table, then one JSON line last."""
