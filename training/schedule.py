"""The learning rate over training time (Section 2.3 and Table 6 of arXiv 2312.02696)."""

import math


def learning_rate_schedule(
    cur_nimg: float, batch_size: int, ref_lr: float = 0.01, ref_batches: float = 70e3, rampup_Mimg: float = 10
) -> float:
    """Adam's learning rate after `cur_nimg` images: linear ramp-up, then decay with the inverse square root (Eq. 67).

    `ref_lr` holds until `ref_batches` batches have passed; 0 switches the decay off. `rampup_Mimg` is the length of the
    ramp-up in millions of images; 0 switches it off.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(cur_nimg / (ref_batches * batch_size), 1))
    if rampup_Mimg > 0:
        lr *= min(cur_nimg / (rampup_Mimg * 1e6), 1)
    return lr
