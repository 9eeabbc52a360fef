"""Reading checkpoints: HF safetensors folders and Megatron's torch_dist."""
