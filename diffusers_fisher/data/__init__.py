"""Reads images with captions, from an image folder or a `datasets` dataset, and folders of cached latents.

Everything is read lazily. The error of an image that can't be read names it; nothing is replaced silently.
"""

from .images import FILE_ROWS, Images, ImageStream, no_images, open_images
from .latents import LATENT_INDEX, CachedLatents, shard_name
from .source import MAX_PIXELS, Caption, Example, ImageData, UnreadableImageError, read_image, without_pillow_warnings

__all__ = [
    "FILE_ROWS", "LATENT_INDEX", "MAX_PIXELS", "CachedLatents", "Caption", "Example", "ImageData", "ImageStream",
    "Images", "UnreadableImageError", "no_images", "open_images", "read_image", "shard_name",
    "without_pillow_warnings",
]  # fmt: skip
