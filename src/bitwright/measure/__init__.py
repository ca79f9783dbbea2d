"""What is measured besides accuracy: whether images are fit to calibrate on, whether a network still answers."""
