"""Pages and pictures of graphs and timings."""
