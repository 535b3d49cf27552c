<<<<<<< HEAD
"""Judging what prefixes do: likelihood of texts, sentiment of generated ones, what tasks do to each other."""

from .interference import Interference, measure_interference
=======
"""Judging what prefixes do: metrics of texts and labels, likelihood, sentiment; what a model writes for many inputs."""

from .metrics import METRICS, Metric, Score, compare, count, score
>>>>>>> e17e114 (docs/evaluation.md: first version)
from .perplexity import perplexity, text_nll
from .predict import Decoding, predict
from .sentiment import SentimentClassifier, TrainedSentiment, train_on_reviews

__all__ = [
<<<<<<< HEAD
    "Interference",
    "SentimentClassifier",
    "TrainedSentiment",
    "measure_interference",
    "perplexity",
=======
    "METRICS",
    "Decoding",
    "Metric",
    "Score",
    "SentimentClassifier",
    "TrainedSentiment",
    "compare",
    "count",
    "perplexity",
    "predict",
    "score",
>>>>>>> e17e114 (docs/evaluation.md: first version)
    "text_nll",
    "train_on_reviews",
]
