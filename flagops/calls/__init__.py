"""What surrounds a call on its road to a kernel: memory, modes, gradients, batches, and how it is run again."""
