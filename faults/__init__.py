"""Faults planted on purpose, to see that the tests notice: `python -m faults --help`."""
