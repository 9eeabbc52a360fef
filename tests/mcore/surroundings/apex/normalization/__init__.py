"""Apex's fused norms."""

from .fused_layer_norm import FusedLayerNormAffineFunction
