"""What a user runs beside the recipes."""
