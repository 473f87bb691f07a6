"""Encodings of weights, lossless: `planes` of all tensors, `delta` from base tensors that the receiver holds, `adapter`
of what is added to those.

Both know tensors and their BLAKE3, not how a payload travels or where it lies.
"""
