"""What the gateway answers, one module a path."""
