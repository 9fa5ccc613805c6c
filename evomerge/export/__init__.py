"""Turns a candidate into what is shared: a recipe, a checkpoint and a model card."""
