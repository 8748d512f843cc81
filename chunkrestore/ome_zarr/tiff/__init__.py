"""TIFF files and folders of them as sources of images, and OME-TIFF as a way out."""
