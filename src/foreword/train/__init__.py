"""Training: the trainer, its arguments, runs and curves."""
