"""Live Megatron-Core models and their ranks: built, filled, read shard by shard."""
