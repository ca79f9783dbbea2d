"""Passes over the captured graph: rewrite, fold, place quantizers, watch values, store."""
