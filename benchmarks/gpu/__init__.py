"""What jobs take on a GPU, each in under eight minutes; proven on a CPU with a tiny network."""
