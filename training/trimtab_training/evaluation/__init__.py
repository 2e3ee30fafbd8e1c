"""Evaluation of controls on any model: questions, log-likelihoods and TOFU, offline or through a gateway."""
