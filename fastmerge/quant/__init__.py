"""Formats of a few bits per weight: one file per format (or tight family)."""
