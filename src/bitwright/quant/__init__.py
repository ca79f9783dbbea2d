"""Grids, ranges and the modules that hold them."""
