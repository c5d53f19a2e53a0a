"""The compiled kernels for the CPU: where they are, and what they can use of it."""
