"""Search files made of what other programs read: configs of mergekit-evolve, and recipes of mergekit."""
