"""The arithmetic in plain NumPy: ground truth of the tests, and fallback without kernels."""
