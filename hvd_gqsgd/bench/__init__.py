"""Benchmarks, each a program: ``python -m hvd_gqsgd.bench.kernels``."""
