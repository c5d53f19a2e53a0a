"""Measurements; `python -m benchmarks.run CASE --out FILE.json` from the repository root."""
