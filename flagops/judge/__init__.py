"""The judge: what a kernel must stand, in stages that know the operator's card and nothing of how kernels go wrong."""
