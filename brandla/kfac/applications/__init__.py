"""Applications of the preconditioner: the evidence of a model, and physics-informed networks."""
