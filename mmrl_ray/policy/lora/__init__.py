"""LoRA adapters: on a policy, in files, and several at once."""
