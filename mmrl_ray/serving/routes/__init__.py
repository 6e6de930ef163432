"""What the gateway answers, each module a subject."""
