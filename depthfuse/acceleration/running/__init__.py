"""How a plan runs: the choice of implementations, of an executor, and the finished model."""
