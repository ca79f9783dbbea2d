"""How fast files run in a runtime, measured: in turn, so that a drifting machine slows all of them alike."""
