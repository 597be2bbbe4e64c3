"""From batches to an evaluated, saved model."""
