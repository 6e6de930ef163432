"""Runs whose processes fail when they are told to, and what judges them: for tests and for `benchmarks/chaos.py`."""
