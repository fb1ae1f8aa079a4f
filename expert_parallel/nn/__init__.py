"""This room holds what the MoE layer and the model around it share: feed-forwards, norms, random numbers."""
