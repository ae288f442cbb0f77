"""Deletion-efficient k-means of Ginart, Guan, Valiant and Zou 2019 (arXiv 1907.05012)."""

from jaxunlearn.unlearners.kmeans._divided import DividedKMeansRecord, divided_kmeans
from jaxunlearn.unlearners.kmeans._quantised import QuantisedKMeansRecord, quantised_kmeans

__all__ = [
    "DividedKMeansRecord",
    "QuantisedKMeansRecord",
    "divided_kmeans",
    "quantised_kmeans",
]
