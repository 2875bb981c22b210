"""Operators for what runs of a model need: norms and readers taken into head space, and all reads of one run."""
