"""The priors of dpkd, one file for each kind of content."""
