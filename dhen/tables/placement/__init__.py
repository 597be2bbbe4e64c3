"""Which rank holds which part of which table."""
