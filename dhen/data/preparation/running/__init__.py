"""Runs a task on every piece, by any number of processes and machines, and goes on after a kill."""
