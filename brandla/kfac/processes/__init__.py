"""Many processes: what they tell each other, so that all take the same step."""
