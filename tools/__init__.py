"""What reads, compares and breaks code: see tools/README.md. Nothing here is installed."""
