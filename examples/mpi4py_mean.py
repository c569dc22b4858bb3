"""The mean of a NumPy vector over MPI ranks: mpirun -n 2 python examples/mpi4py_mean.py"""

import numpy as np
from mpi4py import MPI

from hvd_gqsgd import allreduce

comm = MPI.COMM_WORLD
x = np.random.default_rng(comm.rank).standard_normal(1_000_000).astype(np.float32)
mean = allreduce(x, comm, bits=8)
exact = np.empty_like(x)
comm.Allreduce(x, exact)
exact /= comm.size
if comm.rank == 0:
    print(f"relative error {np.linalg.norm(mean - exact) / np.linalg.norm(exact):.4f}")
