"""depthfuse: make vision networks shallower, and run what is left fast."""
