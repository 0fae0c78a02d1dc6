"""What a sparsity pattern is, how a mask is chosen from scores, and the MaskSet artefact."""
