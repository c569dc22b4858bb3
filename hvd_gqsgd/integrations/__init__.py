"""Adapters for training libraries. Each is imported by its own name, and imports its library.

They know the public names of this package alone, and can be copied from here to be changed.
"""
