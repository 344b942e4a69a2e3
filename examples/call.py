"""Call an operator: torch tensors or NumPy arrays, any strides, gradients included."""

import torch

import flagops

a, b = torch.randn(64, 128), torch.randn(128, 32)
print("the best kernel here:", flagops.matmul(a, b).shape)
print("that one or an error:", flagops.matmul(a, b, backend="numba").shape)

try:
    flagops.matmul(a.long(), b.long())
except TypeError as error:
    print("refused:", error)

x = torch.randn(4, 16, requires_grad=True)
flagops.rms_norm(x, torch.ones(16)).square().sum().backward()
print("gradient:", x.grad.shape)

with flagops.using(backend=["triton", "numba"], budget="64MiB"):  # the first that works
    flagops.swiglu(a, a)
print("who ran:", flagops.coverage("swiglu"))
