"""Models of our own: fusions of modalities, and the learned reward model. Runs without Ray."""
