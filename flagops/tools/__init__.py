"""What only commands use: measuring, the demo, bisecting, type stubs."""
