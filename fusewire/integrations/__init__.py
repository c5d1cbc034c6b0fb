"""Serving engines that fusewire runs in."""
