"""Wiring: a config in, a finished run folder out."""
