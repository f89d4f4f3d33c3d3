"""What is on disk: configuration, marks, files found and written whole."""
