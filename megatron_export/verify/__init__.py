"""Judging a finished checkpoint against its original, or against another checkpoint."""
