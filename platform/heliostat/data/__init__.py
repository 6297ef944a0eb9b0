"""Data sets: raw objects to shuffled, checksummed shards, and shards to batches."""
