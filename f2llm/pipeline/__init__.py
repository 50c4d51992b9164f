"""The pipeline around the method: command line, notebooks as stages, training processes, ablations."""
