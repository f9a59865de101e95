"""Inspection of many images: files, datasets, and blocks of them."""
