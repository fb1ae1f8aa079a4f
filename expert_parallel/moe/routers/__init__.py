"""Routers choose each token's experts and their weights; losses spread the tokens over the experts."""
