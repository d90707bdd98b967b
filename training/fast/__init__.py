"""The network of networks_edm2 arranged for speed: for training, and for sampling with weights prepared once."""
