"""What a policy's captions are worth: captions of a split, their scores, their records."""
