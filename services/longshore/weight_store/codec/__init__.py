"""Lossless encodings of weights: `planes` of all tensors, `delta` from base tensors that the receiver holds.

Both know tensors and their BLAKE3, not how a payload travels or where it lies.
"""
