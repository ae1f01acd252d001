"""Shards: what they hold, which sample comes when, and how batches are made of them."""
