"""Turns raw rows into a prepared folder of ids and numbers."""
