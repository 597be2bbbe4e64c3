"""From a prepared folder to batches."""
