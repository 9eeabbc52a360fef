"""The export: from a plan and a source of weights to a published folder, or to a stream of tensors."""
