"""Meshes, cameras and surfaces: the nouns that every other package shares. Knows nothing of images."""
