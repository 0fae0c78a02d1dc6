"""PATCH: learnable tile-level hybrid sparsity for LLMs (arXiv 2509.23410)."""
