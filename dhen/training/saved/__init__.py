"""Saves and loads: checkpoints, exported models, and scoring and fine-tuning from them."""
