"""The stages of a run: their work, inputs, outputs and status."""

STAGES = ("pack", "prepare", "teach", "distill", "baselines", "evaluate", "export")
"""The names of stages on the command line. Each teacher has a stage, `teach-<name>` (`teach` for one with the name
`teacher`), and so has each baseline, `baseline-<name>`."""
