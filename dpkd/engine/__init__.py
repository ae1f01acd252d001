"""Training of one network: engines, optimizer, state on disk, and the ranks that train together."""
