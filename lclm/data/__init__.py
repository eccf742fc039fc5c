"""Shards, streams, tasks, packing and batches."""
