"""What the deployments are called, in the config, in Serve and in its dashboard."""

from __future__ import annotations

APP = "mmrl"
"""The application of `mmrl serve`."""
GATEWAY = "gateway"
POLICY = "policy"
REWARD = "reward"
