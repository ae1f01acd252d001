"""The stages of a run: their work, inputs, outputs and status."""
