"""The stages of a run: their work, inputs, outputs and status."""

STAGES = ("pack", "prepare", "teach", "distill", "evaluate", "export")
"""The names of stages on the command line; a teacher with another name than `teacher` has a stage `teach-<name>`."""
