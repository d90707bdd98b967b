"""From seeds to pictures: the sampler, guidance, who makes which batch, and files."""
