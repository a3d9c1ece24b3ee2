"""The two halves on disk."""
