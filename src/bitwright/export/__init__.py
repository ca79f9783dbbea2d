"""Files that leave the house: packed integers, ONNX, and the check that they compute what was measured."""
