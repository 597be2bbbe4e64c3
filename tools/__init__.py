"""The tools that a user runs beside the recipes."""
