"""The stages of a run: what each needs and makes, and whether it is done."""
