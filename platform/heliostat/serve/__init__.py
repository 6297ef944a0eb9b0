"""Serving: versions of the registry as HTTP endpoints on the cluster."""
