"""Checkpoints and exported models: saving, loading, scoring and fine-tuning."""
