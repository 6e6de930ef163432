"""Preferences: what people (or a reward) said about two captions of a picture, its schema, store, files and figures."""
