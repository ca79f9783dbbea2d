"""Tensors that few bits do not hold, because some channels or values are far larger than the rest: found and mended."""
