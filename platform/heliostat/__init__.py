"""Heliostat: from raw data in a bucket to answers over HTTP, on one Ray cluster."""

__version__ = "0.1.0"
