"""SLiM: 4-bit weights, and low-rank adapters that make up for what pruning and quantisation lose (arXiv 2410.09615)."""
