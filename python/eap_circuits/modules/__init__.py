"""Single modules of a model: what a norm or a linear layer computes, and weights that are kept elsewhere."""
