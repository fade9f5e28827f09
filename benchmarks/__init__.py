"""Benchmarks of wrn_fast against the strongest peers of the same device: `python -m benchmarks --help`."""
