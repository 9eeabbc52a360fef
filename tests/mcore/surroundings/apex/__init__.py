"""A stand-in for NVIDIA Apex: what Megatron-Core imports of it. Where it is, Megatron's own choice of a norm refuses RMSNorm."""
