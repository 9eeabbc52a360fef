"""What the quantizers that ModelOpt put into a model mean: their settings and their statistics."""
