"""Shards: their content, the order of their samples, and the batches made of them."""
