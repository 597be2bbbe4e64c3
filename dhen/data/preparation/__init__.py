"""From raw rows to a prepared folder of ids and numbers."""
