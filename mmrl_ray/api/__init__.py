"""What Python programs and notebooks call, and the commands of `mmrl` too: train, evaluate, caption, load a run."""
