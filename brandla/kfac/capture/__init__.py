"""Turns backward passes into rows: the inputs of each layer, and the gradients of its outputs."""
