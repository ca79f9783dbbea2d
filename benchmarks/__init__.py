"""Timings as ratios against a baseline of the same run. `make bench` runs all of them."""
