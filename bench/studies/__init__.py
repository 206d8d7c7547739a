"""The studies, a file each: what it varies, measures and draws; beside them networks and other people's optimizers."""
