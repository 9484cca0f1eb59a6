"""Which pretext task transfers best: cells of one budget, their baselines, and the table that they give."""
