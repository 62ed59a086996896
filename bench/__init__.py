"""Benchmarks of every op and of the whole model: ``python -m bench --help``, and README.md beside this."""
