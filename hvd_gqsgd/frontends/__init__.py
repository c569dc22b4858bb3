"""Front ends: Horovod, DDP, FSDP2 and ``allreduce``."""
