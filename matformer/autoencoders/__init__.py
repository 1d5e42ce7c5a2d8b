"""Pixels and sound <-> the latents that the model sees: `load_autoencoder(folder)` gives back any of them."""

from matformer.autoencoders.base import Autoencoder, Moments
from matformer.autoencoders.clip_pca import ClipPCA
from matformer.autoencoders.convolutional import ConvolutionalAutoencoder
from matformer.autoencoders.load import load_autoencoder
from matformer.autoencoders.mdct_pca import MDCTPCA
from matformer.autoencoders.motion_field import MotionField
from matformer.autoencoders.patch_pca import PatchPCA

__all__ = [
    "MDCTPCA",
    "Autoencoder",
    "ClipPCA",
    "ConvolutionalAutoencoder",
    "Moments",
    "MotionField",
    "PatchPCA",
    "load_autoencoder",
]
