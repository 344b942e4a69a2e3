"""Patch a DeepSeek-V4 of transformers: a small random one, whose logits stay and whose tokens are the same."""

import torch

import flagops
from flagops.deepseek_v4.examples import small_deepseek_v4

model = small_deepseek_v4()
prompt = torch.randint(0, 64, (1, 24))
plain = model.generate(prompt, max_new_tokens=8, do_sample=False)

handle = flagops.patch(model)
patched = model.generate(prompt, max_new_tokens=8, do_sample=False)
print(handle.report())
handle.disable()  # exactly undone

print("the same tokens:", torch.equal(plain, patched))
