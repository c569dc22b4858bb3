"""The arithmetic in plain NumPy: the ground truth of the tests, and of the fallback without kernels."""
