"""A captioning agent by deep Q-learning on RLlib; importing the package imports nothing."""
