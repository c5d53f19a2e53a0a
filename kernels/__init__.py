"""CUDA sources, one idea a file, installed as `bminf.kernels` and compiled at first use."""
