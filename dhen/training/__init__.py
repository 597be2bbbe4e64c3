"""Trains, evaluates and saves a model, given batches."""
