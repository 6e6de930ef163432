"""Caption metrics: BLEU, CIDEr-D, ROUGE-L, bootstrap intervals."""
