"""From a candidate to what ships: a recipe, a checkpoint, a model card."""
