"""Bytes on disk to named tensors and back, one at a time: a reader for each layout."""
