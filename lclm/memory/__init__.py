"""Compressed documents in files."""
