"""The training loop, its objectives, and the evaluation of nets."""
