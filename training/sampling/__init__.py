"""From seeds to images: sampler, guidance, batches and files."""
