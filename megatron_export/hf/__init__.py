"""Live transformers models: their tensors and ModelOpt's quantizers under canonical names, and the files beside their weights."""
