"""Pure tensor functions: advantages, policy gradients, KL, regularisers, Q-learning."""
