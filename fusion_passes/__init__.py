"""The passes over a compiled graph, the pipeline that runs them, and the torch.compile backend."""
