"""Many devices: the mesh, the sharding table, and the ops that exchange data over the mesh."""
