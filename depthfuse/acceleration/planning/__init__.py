"""From a model to a plan: tracing, simplifying, fusing."""
