"""What a run prints and leaves behind: progress, curves, and the files of its folder."""
