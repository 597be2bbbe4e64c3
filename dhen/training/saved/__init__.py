"""What a run leaves and takes up again: checkpoints, exported models, scores."""
