"""What a run would do and need, found before it starts."""
