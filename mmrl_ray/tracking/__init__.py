"""Trackers: figures, pictures and results of a run, told to W&B, MLflow, Trackio, TensorBoard or a user's own class."""
