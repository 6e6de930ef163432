"""What flows from sampling to learning: carriers, Arrow schema, buffer, step plan."""
