"""Whether a plan is right, and what each part of it costs."""
