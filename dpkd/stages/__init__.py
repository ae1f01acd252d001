"""The stages of a run, one file each: what it needs, what it makes, and whether it is done."""
