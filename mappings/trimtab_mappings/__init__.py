"""Mapping tables: which token of a control model's vocabulary stands for each token of a target's."""
