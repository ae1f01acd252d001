"""Measures of a network: pure functions, arrays in, numbers out."""
