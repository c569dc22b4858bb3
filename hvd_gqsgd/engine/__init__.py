"""Buckets in flight."""
