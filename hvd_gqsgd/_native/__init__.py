"""The native parts: how they are loaded, and their operators."""
