"""Calibration of live transformers models."""
