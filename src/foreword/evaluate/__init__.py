"""Judging what prefixes do: metrics of texts and labels, likelihood, sentiment, what tasks do to each other."""

from .interference import Interference, measure_interference
from .metrics import METRICS, Metric, Score, compare, count, score
from .perplexity import perplexity, text_nll
from .predict import Decoding, predict
from .sentiment import SentimentClassifier, TrainedSentiment, train_on_reviews

__all__ = [
    "METRICS",
    "Decoding",
    "Interference",
    "Metric",
    "Score",
    "SentimentClassifier",
    "TrainedSentiment",
    "compare",
    "count",
    "measure_interference",
    "perplexity",
    "predict",
    "score",
    "text_nll",
    "train_on_reviews",
]
