"""`flagops train`: a small DeepSeek-V4, trained on a CPU by flagops' own operators, gradients and optimiser."""
