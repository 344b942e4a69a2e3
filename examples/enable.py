"""Replace torch's own operators in a model that knows nothing of it, and see what became of its calls."""

import torch
from torch import nn

import flagops

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 512), nn.RMSNorm(512), nn.SiLU(), nn.Linear(512, 256))
x = torch.randn(32, 256)
plain = model(x)

with flagops.enable(backend="numba", compare=True) as handle:
    for _ in range(20):
        replaced = model(x)

report = handle.report()
print(report)
print("largest difference below 1e-4:", bool((plain - replaced).abs().max() < 1e-4))
print("left to torch, and what to do:", report.to_json()["remedies"])
