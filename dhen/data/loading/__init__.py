"""Turns a prepared folder into batches."""
