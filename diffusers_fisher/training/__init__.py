"""Training utilities: configuration files, resumable training state."""
