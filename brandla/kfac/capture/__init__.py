"""From forward and backward passes to rows: what goes into each layer, and what gradient comes back to it."""
