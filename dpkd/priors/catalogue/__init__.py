"""The priors that come with dpkd, one file each."""
