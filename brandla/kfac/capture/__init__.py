"""From a backward pass to rows: the input of each layer, and the gradient of its output."""
