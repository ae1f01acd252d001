"""The folder of a run, its attempts, its settings and versions."""
