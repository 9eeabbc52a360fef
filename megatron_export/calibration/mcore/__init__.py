"""Calibration of Megatron-Core models: imported where one is given."""
