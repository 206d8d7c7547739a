"""What is built on the preconditioner: the evidence of a model, and physics-informed networks."""
