"""The wrapper tried on every architecture of transformers, diffusers and timm that can be built."""
