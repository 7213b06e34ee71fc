"""Command-line tools: train the demo model, make, inflate, convert and trace checkpoints."""
