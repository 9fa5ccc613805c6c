"""The models that are merged: where they lie, what their headers say, and their tensors one at a time."""
