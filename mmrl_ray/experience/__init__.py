"""What flows from sampling to learning: carriers, Arrow schema, step plan."""
