"""Completions of prompts, sampled token by token."""
