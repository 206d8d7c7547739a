"""The studies, a file each with its settings, measurements and pictures; and the networks and optimizers for them."""
