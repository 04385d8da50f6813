"""Whether the kernels compute right on the device at hand: every op against its float64 oracle."""
