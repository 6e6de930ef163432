"""Distributed RLHF-style fine-tuning of multimodal models on Ray."""

__version__ = "0.1.0"
