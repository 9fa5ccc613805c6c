"""From a recipe to weights: sources, plan, methods, materialize, checkpoint."""
