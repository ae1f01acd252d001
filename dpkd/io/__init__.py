"""Files: storage, checkpoints, and the checks on what is read back."""
