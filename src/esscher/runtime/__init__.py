"""State, optimisation, randomness, files: everything that is not mathematics."""
