"""The ground truth in NumPy, which tests hold the native code against."""
