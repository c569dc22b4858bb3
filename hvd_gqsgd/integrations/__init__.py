"""Adapters for training libraries. Import each by its own name; it imports its library.

Adapters use only public names of this package, so they can be copied and modified.
"""
