"""An accelerated model as a file, and back."""
