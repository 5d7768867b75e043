"""Policy, frozen reference, reward model, critic, sampler: everything that holds weights or reads log-probs."""
