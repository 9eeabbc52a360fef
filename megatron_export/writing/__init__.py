"""Safetensors files, the staging folder, reading back, the manifest, publication."""
