"""The priors that come with dpkd, in files by what they see."""
