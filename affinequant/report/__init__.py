"""What a person sees of a run, an evaluation or an experiment: one page, whose figures are data until they are drawn."""
