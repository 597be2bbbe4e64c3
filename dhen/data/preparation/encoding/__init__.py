"""Turns raw values into ids and numbers, by what it counts and fits in the train split."""
