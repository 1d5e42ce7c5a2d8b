"""Matformer: pretraining of one any-to-any model over bytes, images and audio."""

__version__ = "0.1.0"
