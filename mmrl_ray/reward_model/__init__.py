"""Learned rewards: fusions of modalities, the model on them, and its training. No Ray."""
