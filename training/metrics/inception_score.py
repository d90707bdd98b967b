"""Inception Score: exp of the mean divergence of an image's class distribution from that of all images.

Source: Salimans et al., arXiv 1606.03498, Section 4; the mean over ten parts of the images is usual.

Shape legend: N images, K classes.
"""

import numpy as np
import torch

NUM_SPLITS = 10


def inception_score(logits: np.ndarray, num_splits: int = NUM_SPLITS) -> tuple[float, float]:
    """Mean and standard deviation (divisor: number of parts) over successive parts of the images' logits [N, K].

    Fewer images than parts make as many parts as images.
    """
    scores = []
    for part in np.array_split(logits, min(num_splits, len(logits))):
        log_p = torch.from_numpy(part).to(torch.float64).log_softmax(1)
        p = log_p.exp()
        log_mean = p.mean(0).log().clamp(min=torch.finfo(torch.float64).min)  # a class of probability 0 counts 0
        scores.append(float((p * (log_p - log_mean)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
