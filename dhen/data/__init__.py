"""From click-log files to batches."""
