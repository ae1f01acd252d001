"""This process among its peers: rank, size, device, and agreement among ranks."""
