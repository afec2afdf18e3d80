"""The kernels themselves, in Triton's language. Importing a file of this folder needs the package ``triton``."""
