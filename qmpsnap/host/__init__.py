"""This host: processes, file systems, images, locks."""
