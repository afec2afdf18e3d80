"""Attention with a memory of constant size: tensors in, tensors out. Travels with every linearized checkpoint."""
