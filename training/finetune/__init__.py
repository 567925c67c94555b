"""What learns, and how: the model with its losses, the loop, checkpoints."""
