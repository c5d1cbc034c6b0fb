"""What tests share: ranks, graphs, models, and stand-ins for hardware."""
