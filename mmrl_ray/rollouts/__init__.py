"""Rollout workers, their pool, and the controller."""
