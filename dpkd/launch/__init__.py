"""Processes: pools, groups of training workers, and how they start, stop and are watched."""
