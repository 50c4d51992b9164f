"""What lies on disk: files and folders written whole, tuples, checkpoints, the log of a run, digests of code."""
