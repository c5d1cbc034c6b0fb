"""PyTorch's compiler behind one door: the only private names of it that fusewire uses."""
