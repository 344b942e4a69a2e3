"""Write a small checkpoint of FP8 weights as DeepSeek stores them, convert it to BF16 and compare every bit."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from flagops.checkpoint import convert, load, verify

torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
source, target = folder / "fp8", folder / "bf16"
source.mkdir(parents=True, exist_ok=True)
name = "layers.0.attn.wq_a"
tensors = {
    f"{name}.weight": torch.randn(256, 128).to(torch.float8_e4m3fn),
    f"{name}.scale": torch.full((2, 1), 125, dtype=torch.uint8).view(torch.float8_e8m0fnu),  # 2 ** -2
    "norm.weight": torch.ones(128, dtype=torch.bfloat16),
}
save_file(tensors, source / "model.safetensors")
described = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
(source / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "quantization_config": described}))

print("converted:", convert(source, target).tensors)
print("the same bits again:", verify(source, target).tensors)
for name, tensor in load(source, dtype="bfloat16"):  # or without a copy on disk
    print(name, tuple(tensor.shape), tensor.dtype)
