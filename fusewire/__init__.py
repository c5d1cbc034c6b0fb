"""fusewire."""
