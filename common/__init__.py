"""What no stage is about: the command line, files, the training loop, data, the report."""
