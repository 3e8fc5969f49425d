"""A model over a mesh of devices: which axis of what is cut over which axis of the mesh, and who sums what."""
