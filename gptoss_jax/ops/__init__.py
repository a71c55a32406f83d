"""The maths, as plain functions of arrays: no Flax, no configuration."""
