"""One file an architecture: plain modules that read top to bottom."""
