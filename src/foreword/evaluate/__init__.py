"""Judging what prefixes do: likelihood of texts, sentiment of generated ones."""

from .perplexity import perplexity, text_nll
from .sentiment import SentimentClassifier, TrainedSentiment, train_on_reviews

__all__ = ["SentimentClassifier", "TrainedSentiment", "perplexity", "text_nll", "train_on_reviews"]
