"""Measures of a network: pure functions from arrays to numbers."""
