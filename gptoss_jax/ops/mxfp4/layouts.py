"""Orders of packed weights that kernels read, each lossless and undone by `restore`."""
