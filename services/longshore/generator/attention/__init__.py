"""Attention over a paged cache: a C kernel where it was built, plain torch where not."""
