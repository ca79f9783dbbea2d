"""How much each tensor of a network matters to its output."""
