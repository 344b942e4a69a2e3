"""`flagops plan`: what a model costs on a machine before anybody has either: weights, ranks, and what a token takes.

Bytes and operations are counted from shapes. Times follow from a machine's figures, which are measured, published or
given; nothing here runs a model or needs torch.
"""
