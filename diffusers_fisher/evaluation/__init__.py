"""Studies and evaluations over many samples."""
