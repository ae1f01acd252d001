"""Processes: pools, groups of training workers, their start, stop and watchdog."""
