"""Manifests for Kubernetes from a config: plain dictionaries, made without a model and without a cluster."""
