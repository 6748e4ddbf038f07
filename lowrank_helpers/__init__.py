"""Helpers of the series: data, models, training, rank, factorization, LoRA, and how notebooks run."""
