"""Ten steps of Muon, whose Newton-Schulz iteration runs on the backends of flagops; what is no matrix takes AdamW."""

import torch
from torch import nn

import flagops

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.SiLU(), nn.RMSNorm(64), nn.Linear(64, 32))
matrices, others = flagops.optim.split_parameters(model)
optimizers = flagops.optim.Muon(matrices, lr=2e-2), torch.optim.AdamW(others, lr=2e-2)
tokens, target = torch.randint(0, 64, (128,)), torch.randn(128, 32)

for step in range(10):
    loss = (model(tokens) - target).square().mean()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
