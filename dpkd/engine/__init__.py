"""One network in training: engines, optimizer, state on disk, and the ranks that train together."""
