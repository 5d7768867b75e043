"""One module per reward-model loss: pure mathematics on a batch of scores."""
