"""Log-probs of given completions, on a prefix that the completions of a prompt share."""
