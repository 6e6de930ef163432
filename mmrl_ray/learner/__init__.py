"""The learner group: one optimiser step, the Ray Train loop, checkpoints, schedule."""
