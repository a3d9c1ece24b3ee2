"""Execution state: taking it and loading it."""
