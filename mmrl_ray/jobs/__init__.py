"""Runs as jobs of a cluster, and what is done to a run from outside while it goes on."""
