"""ONNX as a way in: a float file read as a module of PyTorch that computes the same, with a free batch size."""
