"""Other pruning methods, under conditions equal to ours."""
