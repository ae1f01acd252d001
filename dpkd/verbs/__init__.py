"""Commands other than the run."""
