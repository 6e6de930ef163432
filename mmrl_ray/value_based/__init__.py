"""The published place of `exploration`, which lives in `algorithms/dqn/`. Imports nothing."""
