"""What an evaluation finds: metrics over all examples and by group, and values that training never saw."""
