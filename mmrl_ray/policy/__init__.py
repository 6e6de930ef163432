"""The policy: a vision-language model, how it is scored, sampled and adapted."""
