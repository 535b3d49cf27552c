"""Judging what prefixes do: likelihood of texts, sentiment of generated ones, what tasks do to each other."""

from .interference import Interference, measure_interference
from .perplexity import perplexity, text_nll
from .sentiment import SentimentClassifier, TrainedSentiment, train_on_reviews

__all__ = [
    "Interference",
    "SentimentClassifier",
    "TrainedSentiment",
    "measure_interference",
    "perplexity",
    "text_nll",
    "train_on_reviews",
]
