"""What there is to know of a circuit, from many evaluations."""

from .card import RESAMPLED, FaithfulnessCard, check_chosen, faithfulness_card

__all__ = ["RESAMPLED", "FaithfulnessCard", "check_chosen", "faithfulness_card"]
