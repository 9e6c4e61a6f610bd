"""What goes over the line: one file per dialect, and the reading of requests."""
