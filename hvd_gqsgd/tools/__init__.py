"""The command ``hvd-gqsgd``, and tools that its commands share."""
