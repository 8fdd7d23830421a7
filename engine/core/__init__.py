"""What every long job stands on: recipes, randomness, processes, runs, checkpoints, the loop."""
