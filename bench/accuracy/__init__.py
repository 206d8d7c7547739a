"""How far each way of keeping a factor's decomposition is from the factor, over a training run, at equal cost."""
