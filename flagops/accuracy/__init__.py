"""What a backend, a number format or a conversion costs a model, per token and with its error: `flagops accuracy`."""
