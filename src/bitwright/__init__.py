"""bitwright: low-bit vision networks from a trained model and a few unlabelled images."""
