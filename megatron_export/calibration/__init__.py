"""The numbers that a model is quantized with: measured on text, loaded from a file, or ModelOpt's."""
