"""The vocabulary of sparsity: what may be zero together, who decides, how much and when."""
