"""What hands tensors in: Horovod, DDP, and calls of ``allreduce``."""
